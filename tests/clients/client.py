"""A client in Python of a DNS server and a web server behind Services. It prints the addresses it sees and the page as JSON.

client.py DNS-ADDRESS WEB-ADDRESS, or client.py --files, which prints the files of its modules, one per line.
"""

import json
import socket
import sys
import urllib.request

# A query for the A record of web.example.test.
QUERY = b"\x12\x34\x01\x00\x00\x01\0\0\0\0\0\0\x03web\x07example\x04test\0\0\x01\0\x01"
TIMEOUT = 20


def family(address):
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def unconnected(server):
    with socket.socket(family(server), socket.SOCK_DGRAM) as asker:
        asker.settimeout(TIMEOUT)
        asker.sendto(QUERY, (server, 53))
        answer, source = asker.recvfrom(512)
        assert answer[:2] == QUERY[:2]
        return source[:2]


def connected(server):
    with socket.socket(family(server), socket.SOCK_DGRAM) as asker:
        asker.settimeout(TIMEOUT)
        asker.connect((server, 53))
        asker.send(QUERY)
        answer, _, _, source = asker.recvmsg(512)
        assert answer[:2] == QUERY[:2]
        return [asker.getpeername()[:2], source[:2]]


def stream(server):
    with socket.create_connection((server, 53), TIMEOUT) as asker:
        asker.sendall(len(QUERY).to_bytes(2, "big") + QUERY)
        answer = asker.recv(4096)
        assert answer[2:4] == QUERY[:2]
        return asker.getpeername()[:2]


def fetched(server):
    host = f"[{server}]" if ":" in server else server
    with urllib.request.urlopen(f"http://{host}/", timeout=TIMEOUT) as page:
        return page.read().decode()


def main():
    # The lookup of a literal address imports a codec, which must be among the listed files.
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
