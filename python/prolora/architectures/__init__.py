"""Names, shapes and spellings of model families as data: no tensors.

To add a family:

- `families/`: how its modules are called by whom; `family.py` explains the fields.
- `tables/<layout>.json`: names and shapes of each published size, in diffusers' spelling
  (`layouts.py` reads it); `tables/correspondence.json`: which of its blocks were made from blocks
  of another layout.
- `loaders.json`: which programs read its LoRAs in which spelling, measured by running their code
  (`loaders.py` reads it).

CONTRIBUTING.md says how the tables are made and what tests them.
"""
