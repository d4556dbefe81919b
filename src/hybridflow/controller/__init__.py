"""One controller, many processes: worker groups, dispatch, and who starts the processes."""
