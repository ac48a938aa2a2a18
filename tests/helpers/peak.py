"""The most memory that a process has had since its program began, for the code of processes that tests start.

`ru_maxrss` will not do: on Linux it begins with what the parent had, and a worker of pytest has a gigabyte.
"""

PEAK_BYTES = """
def peak_bytes():
    import re, resource, sys
    if sys.platform == "linux":
        return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
"""
