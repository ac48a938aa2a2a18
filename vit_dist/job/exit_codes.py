"""With which codes a verb ends, and what whoever started it may do then."""

DONE = 0
FAILED = 1  # a crash, a lost machine: worth another start
MISTAKE = 2  # in what was asked; another start would end in the same way
PREEMPTED = 75  # EX_TEMPFAIL: stopped after a complete save, to be started again
INTERRUPTED = 130  # what a shell makes of Ctrl-C
CLEAN = (DONE, PREEMPTED)  # all processes of a job end so together
