"""The exit codes of the verbs, and whether it makes sense to start the verb again."""

DONE = 0
FAILED = 1  # a crash or a lost machine; another start may succeed
MISTAKE = 2  # a usage, config or input error; another start would end in the same way
PREEMPTED = 75  # EX_TEMPFAIL: stopped after a complete save, to be started again
INTERRUPTED = 130  # the code that a shell reports after Ctrl-C
CLEAN = (DONE, PREEMPTED)  # the codes with which all processes of a job end together
