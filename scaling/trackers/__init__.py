r"""Copies of the records for dashboards: wandb, trackio, tensorboard; ``metrics.jsonl`` is what counts.

    trainer -> mirror.py -> metrics.jsonl -> follow.py (a process beside the run) \
                                             sync.py   (the command, afterwards)   -> copies.py -> a tracker

- A copy is always made from the records, by the same code while a run trains and afterwards, and is begun
  anew when a run goes on after a kill; so it holds each line once.
- While a run trains, its copies are made by a process of their own that reads the file as it grows: a tracker
  that hangs, fails or eats memory cannot stop or slow the run.
- What a copy holds is remembered beside the run (``ledger.py``); ``sync`` then does only what changed.
- Of keys nothing is written down here: wandb and trackio find them where their own log-in put them.
"""
