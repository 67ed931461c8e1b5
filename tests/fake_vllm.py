"""A stand-in for vLLM's command line: ``serve`` answers over HTTP as vLLM 0.32 does.

The fixture `fake_vllm` installs it under vLLM's own name. What it shall do beyond answering is told
by the model folder's ``config.json``: ``dies`` (the last words of a server that does not start),
``dies_after`` and ``hangs_after`` (requests), ``stubborn`` (ignores SIGTERM), ``child`` (starts
another process).
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

GAUGES = ["num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"]
COUNTERS = ["num_preemptions_total", "prompt_tokens_total", "generation_tokens_total"]


class Answer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # a token is sent when it is there
    config: ClassVar[dict] = {}
    adapters: ClassVar[set] = set()
    counts: ClassVar[dict] = dict.fromkeys([*GAUGES, *COUNTERS], 0.0)
    served = 0
    lock = threading.Lock()

    def log_message(self, *arguments: object) -> None:
        pass

    def do_GET(self) -> None:
        if self.path == "/health":
            self.reply(200, "")
        else:
            lines = [f'vllm:{name}{{engine="0"}} {value}' for name, value in self.counts.items()]
            lines.append('vllm:cache_config_info{num_gpu_blocks="100",block_size="16"} 1.0')
            self.reply(200, "\n".join(lines) + "\n")

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/v1/completions":
            self.complete(asked)
        elif self.path == "/v1/load_lora_adapter":
            self.adapters.add(asked["lora_name"])
            self.reply(200, "Success")
        elif asked["lora_name"] in self.adapters:
            self.adapters.remove(asked["lora_name"])
            self.reply(200, "Success")
        else:
            self.refuse(f"The lora adapter '{asked['lora_name']}' cannot be found.")

    def complete(self, asked: dict) -> None:
        if asked["model"] not in self.adapters | {self.config["name"]}:
            self.refuse(f"The model `{asked['model']}` does not exist.")
            return
        with self.lock:
            Answer.served += 1
            if self.served == self.config.get("hangs_after"):
                os.kill(os.getpid(), signal.SIGSTOP)
        if self.served > self.config.get("dies_after", 10**9):
            print("torch.OutOfMemoryError: CUDA out of memory.", flush=True)
            os._exit(1)
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        prompt, output = len(asked["prompt"]), asked["max_tokens"]
        self.count("prompt_tokens_total", prompt)
        for _ in range(output):
            time.sleep(0.002)
            self.count("generation_tokens_total", 1)
            self.event({"choices": [{"index": 0, "text": "x"}]})
        usage = {"prompt_tokens": prompt, "completion_tokens": output}
        self.event({"choices": [], "usage": usage})
        self.chunk(b"data: [DONE]\n\n")
        self.chunk(b"")

    def count(self, name: str, tokens: int) -> None:
        with self.lock:
            self.counts[name] += tokens

    def event(self, content: dict) -> None:
        self.chunk(f"data: {json.dumps(content, separators=(',', ':'))}\n\n".encode())

    def chunk(self, data: bytes) -> None:
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))

    def refuse(self, message: str) -> None:
        self.reply(404, json.dumps({"error": {"message": message}}))

    def reply(self, status: int, text: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())


class Listener(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, *arguments: object) -> None:
        pass  # a client that hung up


def main() -> None:
    model, flags = Path(sys.argv[2]), sys.argv[3:]
    Answer.config = json.loads((model / "config.json").read_text()) | {"name": model.name}
    if "dies" in Answer.config:
        print(Answer.config["dies"], flush=True)
        sys.exit(1)
    if Answer.config.get("stubborn"):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if Answer.config.get("child"):
        child = subprocess.Popen(["sleep", "600"])
        written = model / "child.pid.part"
        written.write_text(str(child.pid))
        written.replace(model / "child.pid")  # nobody reads half of it
    server = Listener(("127.0.0.1", int(flags[flags.index("--port") + 1])), Answer)
    server.serve_forever()
