"""Names, shapes and spellings of model families as data: no tensors and no user's files.

To add a family:

- `tables/<id>.json`: names and shapes of its weights, in diffusers' spelling (`layouts.py` reads
  it); `tables/correspondence.json`: which of its blocks were made from those of another family.
- A file like `flux.py` if its authors call the modules otherwise: `authors.py` explains the table.
  `bases/keys/fused_weights.py` lists the families whose checkpoints are read in such a spelling.
- `adapters/keys/module_names.py` has the first words of its modules, and `kohya_words.py` beside it
  their words that hold underscores: LoRA keys are read by both. `adapters/family.py` guesses the
  family of a LoRA, for `inspect`.
"""
