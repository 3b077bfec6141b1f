"""A kernel for each notebook, forked from a process that has imported the libraries: importing them takes longer than many pages.

`python kernels.py serve ADDRESS` imports and waits; `python kernels.py kernel ADDRESS CONNECTION_FILE` stands for one kernel:
it asks the server to fork, and the kernel ends when it ends. Of `ssl_nb` and of fastai, which changes tensors, nothing is imported, and no names are left behind.
"""
import json
import os
import signal
import socket
import sys
import threading

LIBRARIES = ('torch', 'torchvision', 'timm', 'sklearn.linear_model', 'sklearn.neighbors', 'sklearn.cluster',
             'pandas', 'matplotlib', 'safetensors.torch', 'ipykernel.kernelapp')


def serve(address):
    os.environ['MPLBACKEND'] = 'module://matplotlib_inline.backend_inline' # as ipykernel has it
    for name in LIBRARIES: __import__(name)
    sys.modules['pandas'].set_option('display.max_columns', 20) # as in a kernel; it believes to be in a terminal
    signal.signal(signal.SIGCHLD, signal.SIG_IGN) # nobody waits for the forks
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen()
    while True:
        asked, _ = listener.accept()
        if os.fork(): asked.close()
        else:
            listener.close()
            become_kernel(asked)


def become_kernel(asked):
    "Run a kernel as the client says, until one of the two ends"
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.setsid()
    given = json.loads(asked.makefile().readline())
    os.environ.clear()
    os.environ.update(given['env'])
    os.chdir(given['folder'])
    sys.path[0] = ''
    def follow():
        asked.recv(1)
        os._exit(0)
    threading.Thread(target=follow, daemon=True).start()
    from ipykernel.kernelapp import launch_new_instance
    sys.argv = ['ipykernel_launcher', '-f', *given['arguments']]
    launch_new_instance()
    os._exit(0)


def kernel(address, *arguments):
    server = socket.socket(socket.AF_UNIX)
    server.connect(address)
    given = dict(env=dict(os.environ), folder=os.getcwd(), arguments=arguments)
    server.sendall(json.dumps(given).encode() + b'\n')
    server.recv(1) # nothing comes, until the kernel has ended


if __name__=='__main__': {'serve': serve, 'kernel': kernel}[sys.argv[1]](*sys.argv[2:])
