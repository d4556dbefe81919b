"""Advantages, one file each."""
