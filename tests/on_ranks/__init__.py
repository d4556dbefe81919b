"""What tests run on real ranks: functions of the processes that `ranks.Ranks` keeps; importable by name there."""
