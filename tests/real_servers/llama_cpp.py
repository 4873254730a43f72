"""llama.cpp's own server, in the process that runs this file: `python llama_cpp.py MODEL.gguf PORT`.

Run by the servers' environment, which has xllamacpp and not potstill.
"""

import sys
import threading

import xllamacpp

params = xllamacpp.CommonParams()
params.model.path = sys.argv[1]
params.port = int(sys.argv[2])
params.n_ctx = 2048
params.n_parallel = 4
params.cpuparams.n_threads = 1
params.model_alias = {"lab"}
params.endpoint_metrics = True
server = xllamacpp.Server(params)
print(server.listening_address, flush=True)
threading.Event().wait()
