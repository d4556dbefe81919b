"""Rewards: verifiable functions, graders, their processes, their audit."""
