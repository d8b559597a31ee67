"""Task `translate`: French to English, from the catalogues of two web frameworks.

Where to look: `corpus.py` the pairs and their split, `tokens.py` the tokenizers, `batches.py` which pairs are batch
k, `model.py` the network, `decode.py` translating with it, `measure.py` the scores, `task.py` all of it together.
"""
