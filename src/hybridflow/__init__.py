"""hybridflow: reinforcement-learning post-training of large language models.

Importing this package imports nothing heavy; import what you need from its rooms, for example
``from hybridflow.trainers.rl.run import open_run``. `docs/architecture.md` says what lives where.
"""

__version__ = "0.1.0"
