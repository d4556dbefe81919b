"""Runs programs of the policy in sandboxes."""
