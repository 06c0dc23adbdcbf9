"""The benchmarks read traffic off a program's text as one would by hand."""

import jax
import jax.numpy as jnp
import pytest

from benchmarks import hlo

pytestmark = pytest.mark.examples

# p is read from device memory into the chip, added to q there, and the sum written back.
# 100 float32 numbers are 400 bytes.
PROGRAM = """\
HloModule test, is_scheduled=true

%fused (a: f32[100], b: f32[100]) -> f32[100] {
  %a = f32[100]{0} parameter(0)
  %b = f32[100]{0} parameter(1)
  ROOT %add = f32[100]{0} add(%a, %b)
}

%keep (t: (f32[100], f32[100])) -> (f32[100]) {
  %t = (f32[100]{0}, f32[100]{0}) parameter(0)
  %kept = f32[100]{0} get-tuple-element(%t), index=0
  ROOT %out = (f32[100]{0}) tuple(%kept)
}

%take (t: (f32[100], f32[100])) -> (f32[100]) {
  %t.1 = (f32[100]{0}, f32[100]{0}) parameter(0)
  %taken = f32[100]{0} get-tuple-element(%t.1), index=1
  %copied = f32[100]{0} copy(%taken)
  ROOT %out.1 = (f32[100]{0}) tuple(%copied)
}

ENTRY %main (p: f32[100], q: f32[100], c: s32[]) -> (f32[100], f32[100]) {
  %p = f32[100]{0:T(128)} parameter(0)
  %q = f32[100]{0:T(128)} parameter(1)
  %c = s32[]{:T(128)} parameter(2)
  %cs = (f32[100]{0:T(128)S(1)}, f32[100]{0:T(128)}, u32[]{:S(2)}) copy-start(%p)
  %cd = f32[100]{0:T(128)S(1)} copy-done(%cs)
  %both = (f32[100]{0}, f32[100]{0}) tuple(%p, %q)
  %cond = (f32[100]{0}) conditional(%c, %both, %both), branch_computations={%keep, %take}
  %kept.1 = f32[100]{0} get-tuple-element(%cond), index=0
  %temp = f32[100]{0:T(128)} fusion(%cd, %q), kind=kLoop, calls=%fused
  %half = ((f32[100]{0}), f32[50]{0:S(1)}, s32[]{:S(2)}) slice-start(%temp), slice={[0:50]}
  %halfd = f32[50]{0:S(1)} slice-done(%half)
  %sum = f32[100]{0:T(128)} fusion(%temp, %q), kind=kLoop, calls=%fused
  %all = f32[100]{0:T(128)} all-reduce(%sum), replica_groups={{0,1}}, to_apply=%fused
  ROOT %result = (f32[100]{0}, f32[100]{0}) tuple(%all, %kept.1)
}
"""


# One loop makes an output, what the next loop reads, and something on the chip.
PAIR = """\
HloModule test, is_scheduled=true

ENTRY %main (p: f32[100], s: f32[]) -> (f32[100], f32[50]) {
  %p = f32[100]{0:T(128)} parameter(0)
  %s = f32[]{:T(128)} parameter(1)
  %three = (f32[100]{0}, /*index=1*/f32[50]{0}, f32[25]{0:S(1)}) fusion(%p), kind=kLoop, calls=%f
  %first = f32[100]{0} get-tuple-element(%three), index=0
  %second = f32[50]{0} get-tuple-element(%three), index=1
  %third = f32[25]{0:S(1)} get-tuple-element(%three), index=2
  %root = f32[]{:T(128)S(6)} sqrt(%s)
  %last = f32[50]{0} fusion(%second, %third, %root), kind=kLoop, calls=%g
  %sum = f32[]{:S(6)} fusion(%first), kind=kLoop, calls=%h
  %both = (f32[25]{0:S(1)}, f32[]{:S(6)}) tuple(%third, %sum)
  %kept = f32[25]{0:S(1)} get-tuple-element(%both), index=0
  %fetched = f32[25]{0:S(1)} fusion(%kept), kind=kLoop, calls=%i
  %wide = f32[200]{0:S(1)} fusion(%fetched), kind=kLoop, calls=%j
  %narrow = f32[25]{0} fusion(%wide), kind=kLoop, calls=%k
  %joined = f32[50]{0:S(1)} custom-call(%kept, %fetched), custom_call_target="ConcatBitcast"
  ROOT %result = (f32[100]{0}, f32[50]{0}) tuple(%first, %last)
}
"""

# Two loops of several results; the second makes all outputs.
CHAIN = """\
HloModule test, is_scheduled=true

ENTRY %main (p: f32[100]) -> (f32[100], f32[100]) {
  %p = f32[100]{0} parameter(0)
  %two = (f32[100]{0}, f32[50]{0}) fusion(%p), kind=kLoop, calls=%f
  %one = f32[100]{0} get-tuple-element(%two), index=0
  %half = f32[50]{0} get-tuple-element(%two), index=1
  %next = f32[100]{0} fusion(%half), kind=kLoop, calls=%g
  %after = f32[25]{0} fusion(%next), kind=kLoop, calls=%h
  %again = f32[100]{0} get-tuple-element(%two), index=0
  ROOT %result = (f32[100]{0}, f32[100]{0}) fusion(%again, %after), kind=kLoop, calls=%i
}
"""


def test_traffic_of_a_program_by_hand():
  """Catches on-chip buffers, views, whole operands of slices and first-step branches counted."""
  program = hlo.parse(PROGRAM)
  copied, fused, sliced = 400, 400 + 400, 200  # p read; q read, temp written; half of temp read
  summed, reduced = 3 * 400, 2 * 400
  assert hlo.traffic(program) == copied + fused + sliced + summed + reduced


def test_temporaries_of_a_program_by_hand():
  """Catches outputs counted as temporaries, and temporaries that are never freed."""
  assert hlo.temporaries(hlo.parse(PROGRAM)) == 400 + 400  # temp, and sum before it is reduced


def test_temporaries_beside_an_output_by_hand():
  """Catches what a loop stores for the next one taken for an output, as its first result is."""
  assert hlo.temporaries(hlo.parse(PAIR)) == 200


def test_temporaries_of_a_chain_by_hand():
  """Catches results that are all freed together, or kept for good, and outputs of the last loop."""
  half, whole, quarter = 200, 400, 100
  two = whole + half
  assert hlo.temporaries(hlo.parse(CHAIN)) == max(two + whole, whole + whole + quarter)


def test_traffic_by_leaf_by_hand():
  """Catches traffic lost, of a small leaf in a large one's, and reads of what the step wrote."""
  assert hlo.traffic_by_leaf(hlo.parse(PAIR)) == {
    (400, 'p'): 400,
    (400, 'written'): 400 + 200,
    (400, ''): 400,  # the sum of `first`
    (800, 'written'): 100,  # of what is on the chip
    (200, ''): 200,
    (200, 'written'): 200,
    (4, 's'): 4,
  }
  copied, fused, summed, reduced = 400, 400, 400, 400
  assert hlo.traffic_by_leaf(hlo.parse(PROGRAM)) == {
    (400, 'p'): copied,
    (400, 'q'): fused + summed,
    (400, ''): 200 + summed + reduced,
    (400, 'written'): fused + summed + reduced,
  }


def test_what_a_program_computes_by_hand():
  """Catches prefetches counted as programs, and loops that read arrays as scalar operations."""
  assert hlo.computed(hlo.parse(PAIR)) == (6, 1)
  assert hlo.computed(hlo.parse(PROGRAM)) == (3, 0)  # two loops and the all-reduce
  assert hlo.instructions(hlo.parse(CHAIN)) == 8


def test_what_cannot_be_counted_is_an_error():
  """Catches loops whose traffic is left out."""
  with pytest.raises(NotImplementedError, match='a while moves: next'):
    hlo.traffic(hlo.parse(CHAIN.replace('fusion(%half), kind=kLoop', 'while(%half)')))


def test_collectives_of_a_program_by_hand():
  """Catches a collective that is missed, and bytes that are not those of its operands."""
  assert hlo.collectives(hlo.parse(PROGRAM)) == [('all-reduce', 1, 400)]


def test_traffic_of_a_compiled_program():
  """Catches a text that is no longer parsed."""
  x = jax.ShapeDtypeStruct((1000,), jnp.bfloat16)
  text = jax.jit(lambda x, y: (x + y, x * y)).lower(x, x).compile().as_text()
  assert hlo.traffic(hlo.parse(text)) in (6 * 2000, 4 * 2000)  # two loops, or one
