"""One controller, many processes: worker groups, dispatch, and the back ends that start the processes."""
