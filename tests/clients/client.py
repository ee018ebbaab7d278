"""A client in Python: what it sees of a DNS server and of a web server behind services, as JSON.

client.py DNS-ADDRESS WEB-ADDRESS, or client.py --files: the files that it is made of, a line each.
"""

import json
import socket
import sys
import urllib.request

# A question for the A record of web.example.test.
QUERY = b"\x12\x34\x01\x00\x00\x01\0\0\0\0\0\0\x03web\x07example\x04test\0\0\x01\0\x01"
PATIENCE = 20


def family(address):
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def unconnected(server):
    with socket.socket(family(server), socket.SOCK_DGRAM) as asker:
        asker.settimeout(PATIENCE)
        asker.sendto(QUERY, (server, 53))
        answer, source = asker.recvfrom(512)
        assert answer[:2] == QUERY[:2]
        return source[:2]


def connected(server):
    with socket.socket(family(server), socket.SOCK_DGRAM) as asker:
        asker.settimeout(PATIENCE)
        asker.connect((server, 53))
        asker.send(QUERY)
        answer, _, _, source = asker.recvmsg(512)
        assert answer[:2] == QUERY[:2]
        return [asker.getpeername()[:2], source[:2]]


def stream(server):
    with socket.create_connection((server, 53), PATIENCE) as asker:
        asker.sendall(len(QUERY).to_bytes(2, "big") + QUERY)
        answer = asker.recv(4096)
        assert answer[2:4] == QUERY[:2]
        return asker.getpeername()[:2]


def fetched(server):
    host = f"[{server}]" if ":" in server else server
    with urllib.request.urlopen(f"http://{host}/", timeout=PATIENCE) as page:
        return page.read().decode()


def main():
    # A literal address is looked up too, by a codec that is imported then.
    socket.getaddrinfo("127.0.0.1", 80)
    if sys.argv[1:] == ["--files"]:
        for module in list(sys.modules.values()):
            if path := getattr(module, "__file__", None):
                print(path)
        return
    dns, web = sys.argv[1:]
    seen = {
        "unconnected": unconnected(dns),
        "connected": connected(dns),
        "stream": stream(dns),
        "page": fetched(web),
    }
    print(json.dumps(seen))


main()
