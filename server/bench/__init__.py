"""The benchmark: our service and what a user would install instead, driven the same way on the same machine.

`python -m bench --help` (in `server/`) or `make bench` runs it; README.md says what is measured and how.

    cli           options; the order of a run
    models        the one model in each peer's format          environments  each peer's own virtual environment
    peers         what is compared: how each is started        processes     starting, freezing, ending, memory
    course        a load: when to send, what to count          client        HTTP and server-sent events, cheaply
    adapters/     peers that are libraries, without HTTP       null_server   answers at once: what the client costs
    scenarios     the measurements                             machine       what the hardware could do at best
    results       one JSON file, resumable                     goals         what must be reached
    report, plots Markdown and PNG out of the JSON alone
"""
