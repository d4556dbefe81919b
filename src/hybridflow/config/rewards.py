"""Names of the built-in rewards, so that an unknown one is refused without loading them.

A test holds this and the table in `rewards/` together.
"""

REWARDS = ("gsm8k", "gsm8k_flexible")
