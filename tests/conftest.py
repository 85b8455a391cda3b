import signal

# a shell starts background jobs with Ctrl-C ignored, and so would be the interrupted commands under test
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
