"""Graders: functions, servers, judges, and what is composed of them."""
