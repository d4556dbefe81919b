"""Graders: functions, servers, judges, and compositions of them."""
