"""Rewards held against answers whose worth is known."""
