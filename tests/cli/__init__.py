"""The command `veltrix`: its verbs through click's runner, its behaviour as a process through real ones."""
