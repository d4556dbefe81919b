"""Where models are: built in this process, or in the processes of pools."""
