"""Tiny models of transformers with what they say, for the tests to compare with.

tests/data has them as torch 2.13.0 (CPU) and transformers 4.57.6 made them:

    python tests/pytorch_models.py FOLDER

with all-MiniLM-L6-v2 unpacked in the folder. `FlaxViTForImageClassification` of that version has
read data/vit, and has saved itself there as flax_model.msgpack.
"""

import sys
from pathlib import Path

T5 = {'vocab_size': 20, 'd_model': 8, 'd_kv': 2, 'num_heads': 3, 'd_ff': 10, 'num_layers': 2}
T5 |= {'relative_attention_num_buckets': 8, 'relative_attention_max_distance': 12}
T5 |= {'num_decoder_layers': 1, 'dropout_rate': 0.0}
GATED = {'feed_forward_proj': 'gated-gelu', 'tie_word_embeddings': False}
VIT = {'hidden_size': 12, 'num_hidden_layers': 2, 'num_attention_heads': 3, 'num_channels': 2}
VIT |= {'intermediate_size': 10, 'image_size': 8, 'patch_size': 4, 'num_labels': 7}
TEXTS = ['That is a happy person', 'That is a very happy person', 'Shares fell on Monday.']


def record(name, folder):
  """Saves a random model, inputs and its logits."""
  import torch
  import transformers
  from safetensors.torch import save_file

  torch.manual_seed(0)
  if name == 'vit':
    model = transformers.ViTForImageClassification(transformers.ViTConfig(**VIT))
    inputs = {'pixel_values': torch.randn(3, 2, 8, 8)}
  else:
    config = transformers.T5Config(**T5, **(GATED if name == 't5_gated' else {}))
    model = transformers.T5ForConditionalGeneration(config)
    seen = torch.ones(2, 24).int()
    seen[1, 17:] = 0  # padding
    inputs = {'input_ids': torch.randint(2, 20, (2, 24)), 'attention_mask': seen}
    inputs['decoder_input_ids'] = torch.randint(2, 20, (2, 15))
  for weight in model.parameters():  # no scale is 1, and no bias 0
    weight.data += 0.3 * torch.randn(weight.shape)
  with torch.no_grad():
    logits = model.eval()(**inputs).logits
  model.save_pretrained(folder)
  save_file({**inputs, 'logits': logits}, folder / 'answers.st')


def record_minilm(weights, file):
  """Saves the means of the hidden states of some texts."""
  import torch
  import transformers
  from safetensors.torch import save_file

  tokens = transformers.AutoTokenizer.from_pretrained(weights)(
    TEXTS, padding=True, return_tensors='pt'
  )
  model = transformers.BertModel.from_pretrained(weights, add_pooling_layer=False)
  with torch.no_grad():
    states = model.eval()(**tokens).last_hidden_state
  seen = tokens['attention_mask'][:, :, None]
  save_file({'means': (states * seen).sum(1) / seen.sum(1)}, file)


if __name__ == '__main__':
  data = Path(__file__).parent / 'data'
  for name in ('t5_relu', 't5_gated', 'vit'):
    record(name, data / name)
  record_minilm(sys.argv[1], data / 'minilm.st')
