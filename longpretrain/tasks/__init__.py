"""Tasks: what is trained. masked_lm.py is the objective; fairseq_plugin.py registers it with
fairseq.

fairseq imports every module of this folder itself when it is given ``--user-dir longpretrain``.
"""
