"""Listen on a port for five minutes: `listen.py PORT`."""

import socket
import sys
import time

server = socket.create_server(("", int(sys.argv[1])))
print("up", flush=True)
time.sleep(300)
