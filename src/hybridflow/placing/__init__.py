"""The placement of models: in this process, or in the processes of pools."""
