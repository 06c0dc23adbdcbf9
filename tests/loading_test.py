"""`load_anchor`: what each kind of checkpoint holds lands where the params are."""

import contextlib
import inspect
import sys

import chex
import h5py
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as old
import pytest
from flax import nnx, serialization
from jax.sharding import NamedSharding, PartitionSpec
from orbax.checkpoint import v1 as ocp
from safetensors.flax import save_file as flax_save
from safetensors.numpy import save_file

import spd_optax as spd


def pretrained():
  """Weights with lists, an integer, a scalar and a bfloat16 leaf, all different."""
  rng = np.random.default_rng(0)

  def normal(*shape):
    return np.array(rng.normal(size=shape), np.float32)

  return {
    'blocks': [{'kernel': normal(4, 8), 'bias': normal(8)} for _ in range(2)],
    'scale': normal(),
    'narrow': normal(3).astype(jnp.bfloat16),
    'steps': np.arange(3),
  }


def named(tree, separator='/', prefix=''):
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  join = jax.tree_util.keystr
  return {prefix + join(at, simple=True, separator=separator): np.asarray(x) for at, x in leaves}


def orbax_v1(path, tree):
  ocp.save(path, tree)
  return path


def orbax_standard(path, tree):
  with old.StandardCheckpointer() as checkpointer:
    checkpointer.save(path, tree)
  return path


def orbax_manager(path, tree):
  with old.CheckpointManager(path) as manager:
    manager.save(5, args=old.args.StandardSave(tree))
  return path / '5'


def orbax_training(path, tree):
  with ocp.training.Checkpointer(path) as checkpointer:
    checkpointer.save_checkpointables(7, {'model': tree, 'other': {'x': np.ones(2)}})
  return path / '7' / 'model'


def safetensors(path, tree):
  save_file(named(tree, '.'), f'{path}.safetensors')
  return f'{path}.safetensors'


def safetensors_shards(path, tree):
  path.mkdir()
  items = list(named(tree, '.').items())
  for i in range(2):
    save_file(dict(items[i::2]), path / f'model-0000{i + 1}-of-00002.safetensors')
  return path


def msgpack(path, tree):
  path.with_suffix('.msgpack').write_bytes(serialization.to_bytes(tree))
  return path.with_suffix('.msgpack')


def npz(path, tree):
  np.savez(path, **named(tree))
  return path.with_suffix('.npz')


def h5(path, tree):
  with h5py.File(path.with_suffix('.h5'), 'w') as file:
    for name, array in named(tree).items():
      file[name] = array
  return path.with_suffix('.h5')


FORMATS = [
  orbax_v1,
  orbax_standard,
  orbax_manager,
  orbax_training,
  safetensors,
  safetensors_shards,
  msgpack,
  npz,
  h5,
]
FILES = [safetensors, msgpack, npz, h5]
each_format = pytest.mark.parametrize('save', FORMATS)
each_kind = pytest.mark.parametrize('save', [orbax_v1, *FILES])  # where all read the same way
each_file = pytest.mark.parametrize('save', FILES)


def zeros(tree):
  return jax.tree.map(jnp.zeros_like, tree)


def expected(tree):
  return tree | {'steps': None}  # an integer is never held


@each_format
def test_what_was_saved_is_the_anchor(save, tmp_path, recwarn):
  """Catches leaves that swap places, a lost dtype, and a warning where all is well."""
  tree = pretrained()
  anchor = spd.load_anchor(save(tmp_path / 'checkpoint', tree), zeros(tree), strict=True)
  chex.assert_trees_all_equal(anchor, jax.tree.map(jnp.asarray, expected(tree)))
  chex.assert_trees_all_equal_dtypes(anchor, jax.tree.map(jnp.asarray, expected(tree)))
  assert not [w for w in recwarn if 'anchor' in str(w.message)]


@each_format
def test_it_gets_the_sharding_and_dtype_of_the_params(save, tmp_path):
  """Catches a whole copy of each leaf on one device, and an anchor in the file's dtype."""
  mesh = jax.make_mesh((4, 2), ('data', 'model'), axis_types=(jax.sharding.AxisType.Auto,) * 2)
  tree = {'kernel': pretrained()['blocks'][0]['kernel'], 'bias': np.ones(8, np.float32)}
  like = {
    'kernel': jax.ShapeDtypeStruct(
      (4, 8), jnp.bfloat16, sharding=NamedSharding(mesh, PartitionSpec('data', 'model'))
    ),
    'bias': jax.device_put(jnp.zeros(8), NamedSharding(mesh, PartitionSpec('model'))),
  }
  anchor = spd.load_anchor(save(tmp_path / 'checkpoint', tree), like)
  for name, leaf in anchor.items():
    assert leaf.sharding == like[name].sharding
  chex.assert_trees_all_equal(anchor['kernel'], jnp.asarray(tree['kernel'], jnp.bfloat16))


@each_format
def test_each_leaf_has_its_own_devices(save, tmp_path):
  """Catches an anchor that must lie on the same devices in all of its leaves."""
  tree = {name: np.full(8, i, np.float32) for i, name in enumerate('abc')}
  mesh = jax.make_mesh((4,), ('x',), axis_types=(jax.sharding.AxisType.Auto,))
  like = zeros(tree)
  like['a'] = jax.device_put(like['a'], NamedSharding(mesh, PartitionSpec('x')))
  like['b'] = jax.device_put(like['b'], jax.devices()[5])
  anchor = spd.load_anchor(save(tmp_path / 'checkpoint', tree), like)
  chex.assert_trees_all_equal(jax.device_get(anchor), tree)
  assert [anchor[name].sharding for name in 'ab'] == [like[name].sharding for name in 'ab']


@each_kind
def test_an_anchor_without_a_sharding_goes_where_the_params_are(save, tmp_path):
  """Also where a mesh is set; catches arrays that are bound to the first device."""
  tree = {'kernel': np.ones((8, 4), np.float32)}
  like = zeros(tree)
  mesh = jax.make_mesh((4,), ('x',), axis_types=(jax.sharding.AxisType.Auto,))
  params = jax.device_put(like, NamedSharding(mesh, PartitionSpec('x')))
  with jax.set_mesh(mesh):
    anchor = spd.load_anchor(save(tmp_path / 'checkpoint', tree), like)
    moved = jax.jit(lambda params, anchor: jax.tree.map(jnp.add, params, anchor))(params, anchor)
  chex.assert_trees_all_equal(jax.device_get(moved), tree)


@each_kind
def test_params_inside_a_larger_tree(save, tmp_path, recwarn):
  """Catches an optimizer's moments taken for params, or reported as surplus."""
  tree, other = pretrained(), jax.tree.map(lambda x: np.asarray(x + 1), pretrained())
  path = save(tmp_path / 'checkpoint', {'state': {'params': tree, 'mu': other}})
  anchor = spd.load_anchor(path, zeros(tree), key='state/params', strict=True)
  chex.assert_trees_all_equal(anchor, jax.tree.map(jnp.asarray, expected(tree)))
  with pytest.raises(
    ValueError, match=r'none of the params (?s:.*)checkpoint: state.mu.blocks.0.b'
  ):
    spd.load_anchor(path, zeros(tree))


@each_kind
def test_what_only_one_side_has(save, tmp_path):
  """Catches a new head that is held to zeros, and silence about what was left out."""
  params = {'body': {'kernel': jnp.zeros((4, 8))}, 'head': {'kernel': jnp.zeros((8, 7))}}
  tree = {'body': {'kernel': np.ones((4, 8), np.float32)}, 'old': {'bias': np.ones(3, np.float32)}}
  path = save(tmp_path / 'checkpoint', tree)
  with pytest.warns(UserWarning, match='stay free') as caught:
    anchor, line = spd.load_anchor(path, params), inspect.currentframe().f_lineno
  text = str(caught[-1].message)
  assert [(w.filename, w.lineno) for w in caught] == [(__file__, line)]
  assert 'head/kernel: in the params, not in the checkpoint' in text
  assert 'old/bias: in the checkpoint, not in the params' in text
  assert anchor['head']['kernel'] is None
  state = spd.adam_spd(1e-3, anchor).init(params)
  assert list(optax.tree.get(state, 'condition')) == ['body~kernel']
  with pytest.raises(ValueError, match=r'(?s)head/kernel: .*old/bias: '):
    spd.load_anchor(path, params, strict=True)


@each_kind
def test_all_mismatches_are_one_error(save, tmp_path):
  """Catches a broadcast anchor, imaginary parts thrown away, and one error at a time."""
  like = {'a': jnp.zeros((8, 4)), 'b': jnp.zeros(3), 'c': jnp.zeros(2), 'fits': jnp.zeros(2)}
  tree = {
    'a': np.zeros((4, 8), jnp.bfloat16),
    'b': np.zeros(3, np.complex64),
    'c': np.zeros(2, np.int32),
    'fits': np.zeros(2, np.float32),
  }
  if save is safetensors:
    tree['b'] = tree['b'].real[:1]  # the format has no complex numbers
  with pytest.raises(ValueError, match='does not fit the params') as error:
    spd.load_anchor(save(tmp_path / 'checkpoint', tree), like)
  lines = str(error.value).splitlines()
  assert [line.strip().partition(':')[0] for line in lines[1:]] == ['a', 'b', 'c']
  assert 'params float32[8, 4], checkpoint bfloat16[4, 8]' in lines[1]


@each_kind
def test_an_anchor_is_finite(save, tmp_path):
  """Catches a NaN that would leave a layer unheld forever, without a word."""
  tree = pretrained()
  tree['blocks'][1]['bias'][2] = np.nan
  tree['scale'] = np.array(np.inf, np.float32)
  with pytest.raises(
    ValueError, match=r'(?s)must be finite.*blocks/1/bias, as float32\n  scale, as float32$'
  ):
    spd.load_anchor(save(tmp_path / 'checkpoint', tree), zeros(tree))


@each_kind
def test_numbers_beyond_a_narrow_dtype(save, tmp_path, recwarn):
  """Catches infinity in float16, and NumPy's warning about a line of the library."""
  path = save(tmp_path / 'checkpoint', {'w': np.full(2, 1e6, np.float32)})
  with pytest.raises(ValueError, match=r'must be finite.*\n  w, as float16$'):
    spd.load_anchor(path, {'w': jnp.zeros(2, jnp.float16)})
  assert not [w for w in recwarn if 'overflow' in str(w.message)]


@each_file
def test_empty_trees(save, tmp_path):
  """Catches an anchor without a single leaf."""
  path = save(tmp_path / 'checkpoint', {})
  with pytest.raises(ValueError, match=r'none of the params(?s:.*)checkpoint: no arrays'):
    spd.load_anchor(path, {'kernel': jnp.zeros(2)})
  with pytest.raises(ValueError, match='none of the params'):
    spd.load_anchor(path, {})


def test_a_state_of_nnx(tmp_path):
  """Catches '/value' in paths on either side, and variables that are lost on the way."""
  model = nnx.Sequential(nnx.Linear(3, 4, rngs=nnx.Rngs(0)), nnx.Linear(4, 2, rngs=nnx.Rngs(1)))
  params = nnx.state(model, nnx.Param)
  with_value = {f'{name}/value': x for name, x in named(nnx.to_pure_dict(params)).items()}
  np.savez(tmp_path / 'a.npz', **with_value)
  anchor = spd.load_anchor(tmp_path / 'a.npz', params, strict=True)
  assert spd.fingerprint(anchor) == spd.fingerprint(params)
  optimizer = nnx.Optimizer(model, spd.adam_spd(1e-3, anchor), wrt=nnx.Param)
  stored = optax.tree.get(optimizer.opt_state, 'anchor')
  chex.assert_trees_all_equal(nnx.to_pure_dict(stored), nnx.to_pure_dict(params))


def test_none_in_like_asks_for_nothing(tmp_path, recwarn):
  """Catches a report about leaves that the user has left out."""
  path = npz(tmp_path / 'a', {'body': np.ones(2, np.float32), 'head': {'bias': np.ones(3)}})
  anchor = spd.load_anchor(path, {'body': jnp.zeros(2), 'head': None}, strict=True)
  assert anchor['head'] is None
  assert not recwarn
  np.savez(tmp_path / 'b.npz', **{'body': np.ones(2), 'body/more': np.ones(2)})
  with pytest.warns(UserWarning, match='body/more: in the checkpoint, not in the params'):
    spd.load_anchor(tmp_path / 'b.npz', {'body': jnp.zeros(2)})


@pytest.mark.parametrize('names', [['a/b'], ['a.b', 'a/b']])
def test_paths_that_differ_in_a_dot_alone(names, tmp_path):
  """Catches one array for two leaves, and the wrong one of two."""
  path = npz(tmp_path / 'a', {name: np.full(2, i, np.float32) for i, name in enumerate(names)})
  for length in (2, 3):
    like = {'a.b': jnp.zeros(length), 'a': {'b': jnp.zeros(2)}}
    with pytest.raises(ValueError, match=r'(?s)like: .* cannot be told apart.*:\n  a/b, a\.b$'):
      spd.load_anchor(path, like)
  like = {'a.b': jnp.zeros(2, int), 'a': {'b': jnp.zeros(2)}}  # an integer asks for nothing
  if len(names) == 1:
    anchor = spd.load_anchor(path, like)
    chex.assert_trees_all_equal(anchor, {'a.b': None, 'a': {'b': jnp.zeros(2)}})
    return
  with pytest.raises(ValueError, match=r'a\.npz: entries that .* told apart, .*:\n  a\.b, a/b$'):
    spd.load_anchor(path, like)


@pytest.mark.parametrize(
  ('module', 'save'),
  [
    ('orbax.checkpoint', orbax_v1),
    ('safetensors', safetensors),
    ('flax.serialization', msgpack),
    ('h5py', h5),
  ],
)
def test_a_missing_library_is_named(module, save, tmp_path, monkeypatch):
  """Catches an ImportError from the middle of the library, without what to install."""
  tree = pretrained()
  path = save(tmp_path / 'checkpoint', tree)
  monkeypatch.setitem(sys.modules, module, None)
  with pytest.raises(ImportError, match=r"pip install 'spd_optax\[checkpoints\]'"):
    spd.load_anchor(path, zeros(tree))


@each_kind
def test_a_param_that_is_called_value(save, tmp_path):
  """Catches a query, key and value of which one is taken for a box around the others."""
  tree = {'attention': {name: np.full(2, i, np.float32) for i, name in enumerate(('key', 'value'))}}
  anchor = spd.load_anchor(save(tmp_path / 'checkpoint', tree), zeros(tree), strict=True)
  chex.assert_trees_all_equal(anchor, jax.tree.map(jnp.asarray, tree))


def test_directories_with_more_than_one_model(tmp_path):
  """Catches an anchor of mixed origin, and half a one where a download broke off."""
  like = {'a': jnp.zeros(2), 'b': jnp.zeros(2)}
  for epoch in (1, 2):
    save_file({'a': np.ones(2, np.float32)}, tmp_path / f'epoch{epoch}.safetensors')
  with pytest.raises(ValueError, match=r'epoch2\.safetensors and another file both have a;'):
    spd.load_anchor(tmp_path, like)
  shards = tmp_path / 'shards'
  shards.mkdir()
  save_file({'a': np.ones(2, np.float32)}, shards / 'model-00002-of-00003.safetensors')
  with pytest.raises(ValueError, match=r'shards: cannot .* only 1 of 3 \.safetensors shards'):
    spd.load_anchor(shards, like)
  orbax_standard(tmp_path / 'runs' / 'one', like)
  with pytest.raises(ValueError, match=r'one step and one tree; found here: one$'):
    spd.load_anchor(tmp_path / 'runs', like)


def test_a_dtype_that_cannot_be_held(tmp_path):
  """Catches a file called corrupt for an entry that nobody asked for."""
  body, narrow = np.ones(2, np.float32), jnp.ones(2, jnp.float8_e4m3fn)
  flax_save({'body': body, 'narrow': narrow, 'empty': jnp.ones((0, 2))}, tmp_path / 'a.safetensors')
  with pytest.warns(UserWarning, match='have not the same leaves'):
    anchor = spd.load_anchor(tmp_path / 'a.safetensors', {'body': jnp.zeros(2)})
  chex.assert_trees_all_equal(anchor['body'], body)
  with pytest.raises(
    ValueError, match=r'narrow: params float32\[2\], checkpoint an unknown kind of number, \[2\]$'
  ):
    spd.load_anchor(tmp_path / 'a.safetensors', {'body': body, 'narrow': jnp.zeros(2)})


def test_a_sharding_that_does_not_fit(tmp_path):
  """Catches a healthy file that is called corrupt because of the params."""
  mesh = jax.make_mesh((4,), ('x',), axis_types=(jax.sharding.AxisType.Auto,))
  path = npz(tmp_path / 'a', {'kernel': np.ones((6, 2), np.float32)})
  for on in (mesh, mesh.abstract_mesh):
    sharding = NamedSharding(on, PartitionSpec('x' if on is mesh else None))
    like = {'kernel': jax.ShapeDtypeStruct((6, 2), jnp.float32, sharding=sharding)}
    with pytest.raises(ValueError, match=r'does not fit(?s:.*)kernel: .*(evenly divi|AbstractM)'):
      spd.load_anchor(path, like)


def test_a_bucket_goes_to_epath(monkeypatch):
  """Catches gs:// taken for a directory here; the bucket is a stand-in."""
  epath = pytest.importorskip('etils.epath')
  seen = []
  monkeypatch.setattr(
    epath.Path('gs://b/a').__class__, 'exists', lambda path: seen.append(str(path))
  )
  with pytest.raises(FileNotFoundError, match='gs://bucket/model'):
    spd.load_anchor('gs://bucket/model', {'kernel': jnp.zeros(2)})
  assert seen == ['gs://bucket/model']
  with pytest.raises(ValueError, match='ftp://a/b: cannot be read'):
    spd.load_anchor('ftp://a/b', {'kernel': jnp.zeros(2)})


PARAMS = {
  'encoder': {
    'dense': {'kernel': np.arange(12.0).reshape(3, 4), 'bias': np.arange(4.0)},
    'query': {'kernel': np.arange(18.0).reshape(3, 2, 3), 'bias': np.arange(6.0).reshape(2, 3)},
    'conv': {'kernel': np.arange(24.0).reshape(2, 2, 2, 3)},
  },
  'shared': np.arange(6.0).reshape(2, 3),
  'tied': np.arange(6.0).reshape(2, 3),
  'head': np.ones(2),
}
IN_TORCH = {
  'encoder.layer.0.dense.weight': PARAMS['encoder']['dense']['kernel'].T,
  'encoder.layer.0.dense.bias': PARAMS['encoder']['dense']['bias'],
  'encoder.layer.0.query.weight': PARAMS['encoder']['query']['kernel'].reshape(3, 6).T,
  'encoder.layer.0.query.bias': PARAMS['encoder']['query']['bias'].ravel(),
  'conv.weight': PARAMS['encoder']['conv']['kernel'].transpose(3, 2, 0, 1),
  'shared.weight': PARAMS['shared'],
  'pooler.weight': np.ones((2, 2)),
}


def in_torch(path):
  """The names and axes of a PyTorch model, as a user would write it."""
  names = {
    'encoder/conv/kernel': ('conv.weight', (2, 3, 1, 0)),
    'head': None,
    'shared': 'shared.weight',
    'tied': 'shared.weight',
  }
  if path in names:
    return names[path]
  path = path.replace('encoder', 'encoder.layer.0').replace('/', '.')
  if path.endswith('kernel'):
    return path.replace('kernel', 'weight'), (1, 0)
  return (path, (0,)) if 'query' in path else path


def torch_file(tmp_path, key=''):
  arrays = {key + name: np.ascontiguousarray(x, np.float32) for name, x in IN_TORCH.items()}
  save_file(arrays, tmp_path / 'torch.safetensors')
  return tmp_path / 'torch.safetensors'


@pytest.mark.parametrize('key', ['', 'model.'])
@pytest.mark.parametrize('as_dict', [False, True], ids=['function', 'dict'])
def test_names_and_layouts_of_pytorch(as_dict, key, tmp_path):
  """Catches a kernel that is not transposed, heads that are split otherwise, and a tied copy."""
  rename = {path: in_torch(path) for path in named(PARAMS)} if as_dict else in_torch
  path = torch_file(tmp_path, key)
  with pytest.warns(UserWarning, match='same leaves') as caught:
    anchor = spd.load_anchor(path, zeros(PARAMS), rename=rename, key=key)
  chex.assert_trees_all_equal(anchor, jax.tree.map(jnp.asarray, PARAMS | {'head': None}))
  message = str(caught[0].message)
  assert 'head: in the params' in message
  assert 'pooler/weight: in the checkpoint' in message
  assert 'dense' not in message


def test_a_renamed_leaf_lies_where_the_param_does(tmp_path):
  """Catches a transposed leaf that stays on one device, or in the file's dtype."""
  mesh = jax.make_mesh((4,), ('model',), axis_types=(jax.sharding.AxisType.Auto,))
  put = NamedSharding(mesh, PartitionSpec(None, 'model'))
  like = {'kernel': jax.ShapeDtypeStruct((3, 4), jnp.bfloat16, sharding=put)}
  rename = {'kernel': ('encoder.layer.0.dense.weight', (1, 0))}
  with pytest.warns(UserWarning, match='same leaves'):
    anchor = spd.load_anchor(torch_file(tmp_path), like, rename=rename)
  assert anchor['kernel'].sharding == put
  assert anchor['kernel'].dtype == jnp.bfloat16
  np.testing.assert_array_equal(anchor['kernel'], PARAMS['encoder']['dense']['kernel'])


def test_what_rename_gets_wrong_is_one_error(tmp_path):
  """Catches a name that is not there and leaves its param free, or axes that do not fit."""
  like = zeros(PARAMS['encoder']['dense'])
  path = torch_file(tmp_path)
  with pytest.raises(ValueError, match='not there') as caught:
    spd.load_anchor(path, like, rename=lambda path: f'dense.{path}')
  assert 'kernel: dense/kernel' in str(caught.value)
  assert 'bias: dense/bias' in str(caught.value)
  assert 'encoder/layer/0/dense/weight' in str(caught.value)
  dense = 'encoder.layer.0.dense.weight'
  for axes in [(0,), (0, 0), (0, 2)]:
    with pytest.raises(
      ValueError, match=r'kernel: .*\[3, 4\], .*\[4, 3\], transposed by'
    ) as caught:
      spd.load_anchor(path, {'kernel': jnp.zeros((3, 4))}, rename={'kernel': (dense, axes)})
  for shape in [(4, 3), (3, 2, 2, 1), (2, 6)]:  # the first would fit as it lies
    like, rename = {'kernel': jnp.zeros(shape)}, {'kernel': (dense, (1, 0))}
    if shape == (3, 2, 2, 1):
      with pytest.warns(UserWarning, match='same leaves'):
        spd.load_anchor(path, like, rename=rename)
    else:
      with pytest.raises(ValueError, match=r'\[4, 3\], transposed by \(1, 0\)'):
        spd.load_anchor(path, like, rename=rename)
  with pytest.raises(ValueError, match=r'kernel: .*\[3, 4\], .*\[4, 3\]$'):
    spd.load_anchor(path, {'kernel': jnp.zeros((3, 4))}, rename={'kernel': dense})


@pytest.mark.parametrize('free', ['by rename', 'in like'])
@pytest.mark.parametrize('as_dict', [False, True], ids=['function', 'dict'])
def test_a_new_head_where_the_file_has_another(as_dict, free, tmp_path):
  """Catches the most usual case taken for a file whose names nobody has said."""
  save_file(
    {'body.weight': np.eye(2, dtype='f4'), 'head.weight': np.ones((9, 2), 'f4')},
    tmp_path / 'torch.safetensors',
  )
  names = {'body/kernel': ('body.weight', (1, 0)), 'head/kernel': None}
  head = {'kernel': jnp.zeros((2, 3))} if free == 'by rename' else None
  like = {'body': {'kernel': jnp.zeros((2, 2))}, 'head': head}
  rename = names if as_dict else names.get
  with pytest.warns(UserWarning, match='same leaves') if head else contextlib.nullcontext():
    anchor = spd.load_anchor(tmp_path / 'torch.safetensors', like, rename=rename)
  np.testing.assert_array_equal(anchor['body']['kernel'], np.eye(2))
  assert not jax.tree.leaves(anchor['head'])


def test_weights_as_keras_saves_them(tmp_path):
  """Catches names and groups of a file that Keras wrote."""
  with h5py.File(tmp_path / 'model.weights.h5', 'w') as file:  # as keras 3.15 lays it out
    file['layers/dense/vars/0'] = np.float32(PARAMS['encoder']['dense']['kernel'])
    file['layers/dense/vars/1'] = np.float32(PARAMS['encoder']['dense']['bias'])
    file.create_group('layers/dropout/vars')
    file['unasked'] = h5py.Empty('f4')
    file['_layer_checkpoint_dependencies'] = h5py.SoftLink('/layers')
  rename = {'dense/kernel': 'layers/dense/vars/0', 'dense/bias': 'layers/dense/vars/1'}
  like = zeros({'dense': PARAMS['encoder']['dense']})
  anchor = spd.load_anchor(tmp_path / 'model.weights.h5', like, rename=rename, strict=True)
  chex.assert_trees_all_equal(
    anchor['dense'], jax.tree.map(jnp.asarray, PARAMS['encoder']['dense'])
  )


def test_a_file_that_points_to_another_is_refused(tmp_path):
  """Catches a checkpoint from outside that reads a file of the user's."""
  (tmp_path / 'secret').write_bytes(np.ones(4, np.float32).tobytes())
  with h5py.File(tmp_path / 'a.h5', 'w') as file:
    outside = [(str(tmp_path / 'secret'), 0, 16)]
    file.create_dataset('bias', (4,), np.float32, external=outside)
  with pytest.raises(ValueError, match='bias: its values are in another file'):
    spd.load_anchor(tmp_path / 'a.h5', {'bias': jnp.zeros(4)})
  with h5py.File(tmp_path / 'b.h5', 'w') as file:
    file['bias'] = h5py.ExternalLink(str(tmp_path / 'c.h5'), 'bias')
  with h5py.File(tmp_path / 'c.h5', 'w') as file:
    file['bias'] = np.ones(4, np.float32)
  with pytest.raises(ValueError, match='none of the params'):
    spd.load_anchor(tmp_path / 'b.h5', {'bias': jnp.zeros(4)})
