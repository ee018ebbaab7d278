// Reference programs of `cargo xtask bench nodeport`: the work of lb's programs on packets, written by hand in C, on the
// maps that the agent created and filled. An empty program, and a program that prepares packets for all of them.
//
// The steps and the calls of the kernel are those of docs/architecture.md, "The path of a packet", for devices with a
// link layer header. Left out are trace events (as in sockets.bpf.c) and the creation of resets and ICMP errors: packets
// that would be answered so are dropped. No measured packet takes these paths.

#include "lb.h"

#define noinline __attribute__((noinline))

enum { UNSPEC = -1, SHOT = 2 };
enum { TCP = 6, UDP = 17, SCTP = 132, ICMP = 1, ICMPV6 = 58 };
enum { AF_INET = 2, AF_INET6 = 10 };
enum { ETHERNET = 14, IPV4 = 20, IPV6 = 40, HEADERS = 14 + 40 + 20 };
enum { FIN = 1, SYN = 2, RST = 4, ACK = 16 };
// Flags of bpf_l4_csum_replace.
enum { PSEUDO_HEADER = 1 << 4, MAY_BE_ZERO = 1 << 5, CSUM_IPV6 = 1 << 7 };
// Results of bpf_fib_lookup.
enum { FIB_FOUND = 0, FIB_HERE = 4, FIB_NO_NEIGHBOUR = 7, FIB_TOO_LONG = 8 };
enum { MTU_SEGMENTS = 1, CURRENT_NETNS = -1 };
// Flags of a conntrack entry.
enum { REPLY = 1, EGRESS = 2, FORWARD = 4, AGAIN = 8 };
// Flag of a device, and flag of bpf_redirect.
enum { BRIDGE = 4, INTO = 1 };
enum { SEEN_SYN = 1, SEEN_FIN = 2, SEEN_RST = 4 };
enum { INTERNAL, EXTERNAL, CLUSTER };
// Flags of an address.
enum { INSIDE = 1, HERE = 2 };
enum { PORTS_TRIED = 16 };
// Result of a step in addition to SERVED and PASSED: the packet belongs to no flow.
enum { NEW = -3 };

// UAPI: the context of tc programs.
struct __sk_buff {
	u32 len, pkt_type, mark, queue_mapping, protocol, vlan_present, vlan_tci, vlan_proto, priority, ingress_ifindex, ifindex,
		tc_index, cb[5], hash, tc_classid, data, data_end, napi_id, family, remote_ip4, local_ip4, remote_ip6[4],
		local_ip6[4], remote_port, local_port, data_meta;
	u64 flow_keys, tstamp;
	u32 wire_len, gso_segs;
	void *sk __attribute__((aligned(8)));
	u32 gso_size;
};

// UAPI: the parameters of a route lookup.
struct fib {
	u8 family, protocol;
	u16 src_port, dst_port, length;
	u32 device, tos, src[4], dst[4];
	u16 vlan[2];
	u8 src_mac[6], dst_mac[6];
};

// UAPI: the neighbor that a packet is sent to.
struct neighbour {
	u32 family, addr[4];
};

// UAPI: the tuple of a socket lookup.
union sock_tuple {
	struct {
		u32 src, dst;
		u16 src_port, dst_port;
	} v4;
	struct {
		u32 src[4], dst[4];
		u16 src_port, dst_port;
	} v6;
};

static long (*tail_call)(void *ctx, void *programs, u32 index) = (void *)12;
static long (*store)(void *skb, u32 at, const void *from, u32 len, u64 flags) = (void *)9;
static long (*l3_csum_replace)(void *skb, u32 at, u64 from, u64 to, u64 flags) = (void *)10;
static long (*l4_csum_replace)(void *skb, u32 at, u64 from, u64 to, u64 flags) = (void *)11;
static long (*pull_data)(void *skb, u32 len) = (void *)39;
static long (*fib_lookup)(void *ctx, struct fib *fib, int len, u32 flags) = (void *)69;
static void *(*sk_lookup_tcp)(void *ctx, void *tuple, u32 len, u64 netns, u64 flags) = (void *)84;
static void *(*sk_lookup_udp)(void *ctx, void *tuple, u32 len, u64 netns, u64 flags) = (void *)85;
static long (*sk_release)(void *sk) = (void *)86;
static long (*redirect)(u32 device, u64 flags) = (void *)23;
static long (*redirect_neigh)(u32 device, struct neighbour *to, int len, u64 flags) = (void *)152;
static long (*check_mtu)(void *ctx, u32 device, u32 *mtu, int diff, u64 flags) = (void *)163;

// Key of a conntrack entry: the tuple of one direction of a flow. Ports in host byte order.
struct ct_key {
	struct addr src, dst;
	u16 src_port, dst_port;
	u32 proto;
};

// Conntrack entry: the translated tuple, and the state of the flow.
struct ct_entry {
	struct addr src, dst;
	u16 src_port, dst_port;
	u32 backend, generation, service;
	u64 seen;
	u16 flags;
	u8 state, set;
	u32 pad;
};

// Value of CT and CT_NEW. It is too large for the stack of a chain of calls.
struct ct_value {
	struct ct_entry used;
	u64 reserved[8];
};

struct device {
	struct addr v4, v6;
	u32 flags, pad;
	u64 reserved[3];
};

struct prefix {
	u32 length, addr[4];
};

struct source_range {
	u32 length, service, addr[4];
};

#define WORDS(addr) { (addr).high, (addr).high >> 32, (addr).low, (addr).low >> 32 }

struct {
	__uint(type, MAP_HASH);
	__uint(max_entries, 1);
	__type(key, struct ct_key);
	__type(value, struct ct_value);
} CT SEC(".maps");

struct {
	__uint(type, MAP_LRU_HASH);
	__uint(max_entries, 1);
	__type(key, struct ct_key);
	__type(value, struct ct_value);
} CT_NEW SEC(".maps");

struct {
	__uint(type, MAP_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, u32);
	__type(value, struct ct_value);
} SCRATCH SEC(".maps");

// Inserts an entry unless the map has its key.
static inline long insert(void *map, const struct ct_key *key, const struct ct_entry *entry)
{
	u32 zero = 0;
	struct ct_value *value = map_lookup(&SCRATCH, &zero);

	if (!value)
		return -1;
	value->used = *entry;
	return map_update(map, key, value, NOEXIST);
}

struct {
	__uint(type, MAP_HASH);
	__uint(max_entries, 1);
	__uint(map_flags, NO_PREALLOC);
	__type(key, u32);
	__type(value, struct device);
} DEVICES SEC(".maps");

struct {
	__uint(type, MAP_LPM_TRIE);
	__uint(max_entries, 1);
	__uint(map_flags, NO_PREALLOC);
	__type(key, struct source_range);
	__type(value, u32);
} SOURCE_RANGES SEC(".maps");

struct {
	__uint(type, MAP_LPM_TRIE);
	__uint(max_entries, 1);
	__uint(map_flags, NO_PREALLOC);
	__type(key, struct prefix);
	__type(value, u32);
} CLUSTER_CIDRS SEC(".maps");

// A parsed packet.
struct packet {
	struct ct_key is;
	u8 flags, ttl, tos;
};

struct ethernet {
	u8 dst[6], src[6];
	u16 type;
};

struct ipv4 {
	u8 version, tos;
	u16 length, id, fragment;
	u8 ttl, proto;
	u16 checksum;
	u32 src, dst;
};

struct ipv6 {
	u16 version, flow, length;
	u8 proto, ttl;
	struct addr src, dst;
};

struct tcp {
	u16 src_port, dst_port;
	u32 seq, ack;
	u8 offset, flags;
	u16 window;
};

struct udp {
	u16 src_port, dst_port, length, checksum;
};

#define ends_beyond(header, end) ((void *)((header) + 1) > (end))

static inline int begins(const struct packet *p)
{
	return (p->flags & (SYN | ACK | RST | FIN)) == SYN;
}

// Returns the drop reason of a packet of another protocol, or PASSED if it is not counted.
static inline int other(u8 proto, const u8 *at, const void *end)
{
	if (proto == SCTP)
		return OTHER_PROTOCOL;
	if (proto != ICMP && proto != ICMPV6)
		return PASSED;
	if ((void *)(at + 2) > end)
		return PASSED;
	if (proto == ICMP)
		return *at == 3 || *at == 11 || *at == 12 ? ICMP_ERROR : PASSED;
	return *at >= 1 && *at <= 4 ? ICMP_ERROR : PASSED;
}

// Parses the transport header. `says`: the remaining length by the IP header; `there`: the remaining bytes of the packet.
static inline int parse_transport(const struct __sk_buff *skb, struct packet *p, const void *at, const void *end, int says,
				  int there)
{
	int length;

	if (p->is.proto == TCP) {
		const struct tcp *tcp = at;

		if (ends_beyond(tcp, end))
			return MALFORMED;
		p->is.src_port = __builtin_bswap16(tcp->src_port);
		p->is.dst_port = __builtin_bswap16(tcp->dst_port);
		p->flags = tcp->flags;
		length = (tcp->offset >> 4) * 4;
		if (length < 20)
			return MALFORMED;
	} else {
		const struct udp *udp = at;

		if (ends_beyond(udp, end))
			return MALFORMED;
		p->is.src_port = __builtin_bswap16(udp->src_port);
		p->is.dst_port = __builtin_bswap16(udp->dst_port);
		p->flags = 0;
		length = __builtin_bswap16(udp->length);
		if (unlikely(length < 8 || length > there) && !skb->gso_size)
			return MALFORMED;
		length = 8;
	}
	if (unlikely(there < length || ((says < length || says > there) && !skb->gso_size)))
		return MALFORMED;
	return SERVED;
}

// Parses a packet. Returns SERVED, PASSED, or the drop reason of a packet that is passed on.
static inline int parse(struct __sk_buff *skb, struct packet *p)
{
	void *data = (void *)(u64)skb->data, *end = (void *)(u64)skb->data_end;
	u32 wanted = skb->len < HEADERS ? skb->len : HEADERS;
	struct ethernet *link;

	if (unlikely(data + wanted > end)) {
		pull_data(skb, wanted);
		data = (void *)(u64)skb->data;
		end = (void *)(u64)skb->data_end;
	}
	link = data;
	if (ends_beyond(link, end))
		return PASSED;
	if (link->type == __builtin_bswap16(0x0800)) {
		const struct ipv4 *ip = (void *)(link + 1);

		if (ends_beyond(ip, end))
			return MALFORMED;
		if (ip->proto != TCP && ip->proto != UDP)
			return other(ip->proto, (void *)ip + (ip->version & 15) * 4, end);
		if (unlikely(ip->version != 0x45))
			return ip->version > 0x45 && ip->version < 0x50 ? HEADER_OPTIONS : MALFORMED;
		if (unlikely(ip->fragment & __builtin_bswap16(0x3fff)))
			return FRAGMENT;
		p->is.src = mapped(ip->src);
		p->is.dst = mapped(ip->dst);
		p->is.proto = ip->proto;
		p->ttl = ip->ttl;
		p->tos = ip->tos;
		return parse_transport(skb, p, ip + 1, end, __builtin_bswap16(ip->length) - IPV4,
				       skb->len - ETHERNET - IPV4);
	}
	if (link->type == __builtin_bswap16(0x86dd)) {
		const struct ipv6 *ip = (void *)(link + 1);

		if (ends_beyond(ip, end))
			return MALFORMED;
		switch (ip->proto) {
		case TCP:
		case UDP:
			break;
		case 0:
		case 43:
		case 51:
		case 60:
		case 135:
			return HEADER_OPTIONS;
		case 44:
			return FRAGMENT;
		default:
			return other(ip->proto, (void *)(ip + 1), end);
		}
		if (unlikely((ip->version & 0xf0) != 0x60))
			return MALFORMED;
		p->is.src = ip->src;
		p->is.dst = ip->dst;
		if (unlikely(is_v4(p->is.src) || is_v4(p->is.dst)))
			return MALFORMED;
		p->is.proto = ip->proto;
		p->ttl = ip->ttl;
		p->tos = __builtin_bswap16(ip->version) >> 4;
		if (unlikely(!ip->length && !skb->gso_size))
			return MALFORMED;
		return parse_transport(skb, p, ip + 1, end, __builtin_bswap16(ip->length), skb->len - ETHERNET - IPV6);
	}
	return PASSED;
}

// Returns the TCP state of one direction after a segment with these flags.
static inline u8 state_after(u8 state, u8 flags)
{
	if (flags & RST)
		return state | SEEN_RST;
	if (flags & SYN)
		return SEEN_SYN;
	state &= ~SEEN_RST;
	return flags & FIN ? state | SEEN_FIN : state;
}

static inline void touch(struct ct_entry *entry, u8 flags, int tcp)
{
	u64 now = ktime_get_coarse_ns(), seen = READ_ONCE(entry->seen);

	if (now > seen && now - seen >= SECOND)
		WRITE_ONCE(entry->seen, now);
	if (tcp) {
		u8 state = READ_ONCE(entry->state), after = state_after(state, flags);

		if (after != state)
			WRITE_ONCE(entry->state, after);
	}
}

static inline void other_key(const struct ct_key *key, const struct ct_entry *entry, struct ct_key *other)
{
	other->src = entry->dst;
	other->dst = entry->src;
	other->src_port = entry->dst_port;
	other->dst_port = entry->src_port;
	other->proto = key->proto;
}

static inline u16 opposite(u16 flags)
{
	u16 way = flags & FORWARD		 ? flags & EGRESS ? 0 : FORWARD
		  : flags & EGRESS		 ? 0
		  : flags & REPLY		 ? EGRESS | FORWARD
						 : EGRESS;

	return way | ((flags & REPLY) ^ REPLY);
}

static inline void other_entry(const struct ct_key *key, const struct ct_entry *entry, struct ct_entry *other)
{
	other->src = key->dst;
	other->dst = key->src;
	other->src_port = key->dst_port;
	other->dst_port = key->src_port;
	other->backend = entry->backend;
	other->generation = entry->generation;
	other->service = entry->service;
	other->seen = entry->seen;
	other->flags = opposite(entry->flags);
	other->state = 0;
	other->set = entry->set;
	other->pad = 0;
}

// Inserts the reply direction into CT_NEW, unless that tuple belongs to another flow.
static noinline int claim_answers(const struct ct_key *key, const struct ct_entry *entry)
{
	struct ct_key answers;
	struct ct_entry other;

	other_key(key, entry, &answers);
	if (map_lookup(&CT, &answers) || map_lookup(&CT_NEW, &answers))
		return 0;
	other_entry(key, entry, &other);
	return !insert(&CT_NEW, &answers, &other);
}

static noinline void forget(const struct ct_key *key, const struct ct_entry *entry)
{
	struct ct_key answers;

	other_key(key, entry, &answers);
	map_delete(&CT, key);
	map_delete(&CT_NEW, key);
	map_delete(&CT, &answers);
	map_delete(&CT_NEW, &answers);
}

static noinline u8 other_state(const struct ct_key *key, const struct ct_entry *entry)
{
	struct ct_key answers;
	struct ct_entry *other;

	other_key(key, entry, &answers);
	other = map_lookup(&CT, &answers);
	if (!other)
		other = map_lookup(&CT_NEW, &answers);
	return other ? READ_ONCE(other->state) : 0;
}

static inline int keep(const struct ct_key *key, const struct ct_entry *entry)
{
	long error = insert(&CT, key, entry);

	return !error || error == -17;
}

// Handles the first reply: both directions move to CT. `entry` is that of the reply direction.
static noinline int establish(const struct ct_key *key, struct ct_entry *entry, u8 flags)
{
	struct ct_key client;
	struct ct_entry other, *known;

	entry->seen = ktime_get_coarse_ns();
	entry->state = state_after(0, flags);
	other_key(key, entry, &client);
	other_entry(key, entry, &other);
	known = map_lookup(&CT_NEW, &client);
	if (known)
		other.state = READ_ONCE(known->state);
	if (!keep(&client, &other) || !keep(key, entry)) {
		map_delete(&CT, &client);
		return CONNTRACK_FULL;
	}
	map_delete(&CT_NEW, key);
	map_delete(&CT_NEW, &client);
	return SERVED;
}

// The next hop of a packet.
struct hop {
	u32 device;
	struct neighbour neighbour;
};

// Looks up the route of a packet after the translation by its entry. PASSED: the destination is local.
static noinline int route(struct __sk_buff *skb, const struct packet *p, const struct ct_entry *entry, struct hop *hop)
{
	struct fib fib = { .device = skb->ifindex, .protocol = p->is.proto };
	long result;

	if (is_v4(entry->dst)) {
		fib.family = AF_INET;
		fib.tos = p->tos;
		fib.src[0] = entry->src.low >> 32;
		fib.dst[0] = entry->dst.low >> 32;
	} else {
		fib.family = AF_INET6;
		fib.src[0] = entry->src.high;
		fib.src[1] = entry->src.high >> 32;
		fib.src[2] = entry->src.low;
		fib.src[3] = entry->src.low >> 32;
		fib.dst[0] = entry->dst.high;
		fib.dst[1] = entry->dst.high >> 32;
		fib.dst[2] = entry->dst.low;
		fib.dst[3] = entry->dst.low >> 32;
	}
	result = fib_lookup(skb, &fib, sizeof(fib), 0);
	if (result == FIB_HERE)
		return PASSED;
	if (unlikely(result != FIB_FOUND && result != FIB_NO_NEIGHBOUR && result != FIB_TOO_LONG))
		return NO_ROUTE;
	hop->device = fib.device;
	hop->neighbour.family = fib.family;
	for (int i = 0; i < 4; ++i)
		hop->neighbour.addr[i] = fib.dst[i];
	return SERVED;
}

static inline u32 folded(u64 sum)
{
	sum = (u32)sum + (sum >> 32);
	return (u32)sum + (u32)(sum >> 32);
}

static inline u64 halves(u64 word)
{
	return (u64)(u32)word + (word >> 32);
}

static inline u32 ports(u16 src, u16 dst)
{
	return __builtin_bswap16(src) | (u32)__builtin_bswap16(dst) << 16;
}

// Rewrites addresses and ports of a packet; with `hop`, decrements its time to live.
static noinline int rewrite(struct __sk_buff *skb, const struct packet *p, const struct ct_entry *entry, int hop)
{
	u32 was = ports(p->is.src_port, p->is.dst_port), becomes = ports(entry->src_port, entry->dst_port);
	u32 change = folded((u64)(u32)~was + becomes), checksum, transport, addresses;
	u64 flags = p->is.proto == UDP ? MAY_BE_ZERO : 0;
	u8 ttl = p->ttl - 1;
	long error;

	if (is_v4(p->is.src)) {
		u32 pair[2] = { entry->src.low >> 32, entry->dst.low >> 32 };
		u64 sum = (u64)(u32)~(p->is.src.low >> 32) + (u32)~(p->is.dst.low >> 32) + pair[0] + pair[1];

		addresses = folded(sum);
		if (unlikely(store(skb, ETHERNET + 12, pair, sizeof(pair), 0)))
			return REWRITE_FAILED;
		if (hop) {
			u16 old = p->ttl | p->is.proto << 8, new = ttl | p->is.proto << 8;

			if (unlikely(store(skb, ETHERNET + 8, &ttl, sizeof(ttl), 0)))
				return REWRITE_FAILED;
			sum += (u64)~(u32)old + new;
		}
		if (unlikely(l3_csum_replace(skb, ETHERNET + 10, 0, folded(sum), 0)))
			return REWRITE_FAILED;
		transport = ETHERNET + IPV4;
		checksum = transport + (p->is.proto == UDP ? 6 : 16);
		error = l4_csum_replace(skb, checksum, 0, addresses, flags | PSEUDO_HEADER);
	} else {
		addresses = folded(halves(~p->is.src.high) + halves(~p->is.src.low) + halves(~p->is.dst.high) +
				   halves(~p->is.dst.low) + halves(entry->src.high) + halves(entry->src.low) +
				   halves(entry->dst.high) + halves(entry->dst.low));
		// Source and destination follow each other in both.
		if (unlikely(store(skb, ETHERNET + 8, entry, sizeof(entry->src) + sizeof(entry->dst), 0)))
			return REWRITE_FAILED;
		if (hop && unlikely(store(skb, ETHERNET + 7, &ttl, sizeof(ttl), 0)))
			return REWRITE_FAILED;
		transport = ETHERNET + IPV6;
		checksum = transport + (p->is.proto == UDP ? 6 : 16);
		error = l4_csum_replace(skb, checksum, 0, addresses, flags | PSEUDO_HEADER | CSUM_IPV6);
		// Kernels before 6.16 do not know the flag.
		if (unlikely(error))
			error = l4_csum_replace(skb, checksum, 0, addresses, flags | PSEUDO_HEADER);
	}
	if (unlikely(error || l4_csum_replace(skb, checksum, 0, change, flags) ||
		     store(skb, transport, &becomes, sizeof(becomes), 0)))
		return REWRITE_FAILED;
	return SERVED;
}

// Result of a packet in addition to the drop reason.
struct outcome {
	int verdict;
	u32 service;
};

static inline int forward(struct __sk_buff *skb, const struct packet *p, const struct ct_entry *entry, struct hop *hop,
			  int at_egress, struct outcome *outcome)
{
	u32 mtu = 0;
	int result;

	if (unlikely(p->ttl <= 1 && !at_egress))
		return TTL_EXCEEDED;
	if (unlikely(check_mtu(skb, hop->device, &mtu, 0, MTU_SEGMENTS)))
		return TOO_BIG;
	result = rewrite(skb, p, entry, !at_egress);
	if (result == SERVED)
		outcome->verdict = redirect_neigh(hop->device, &hop->neighbour, sizeof(hop->neighbour), 0);
	return result;
}

// Translates a packet by its entry, and passes it to the stack.
static inline int deliver(struct __sk_buff *skb, const struct packet *p, const struct ct_entry *entry,
			  struct outcome *outcome)
{
	int again = entry->flags & AGAIN;
	int result;

	if (unlikely(again && p->ttl <= 1))
		return TTL_EXCEEDED;
	result = rewrite(skb, p, entry, again);
	if (again && result == SERVED)
		outcome->verdict = redirect(skb->ifindex, INTO);
	return result;
}

static inline int serving_of(u32 service, u8 set, struct serving *serving)
{
	serving->service = service;
	serving->entry = map_lookup(&SERVICES, &service);
	if (!serving->entry)
		return BAD_SERVICE_INDEX;
	serving->flags = READ_ONCE(serving->entry->flags);
	switch (set) {
	case INTERNAL:
		serving->set = &serving->entry->internal;
		serving->member = IN_INTERNAL;
		return SERVED;
	case EXTERNAL:
		serving->set = &serving->entry->external;
		serving->member = IN_EXTERNAL;
		return SERVED;
	case CLUSTER:
		serving->set = &serving->entry->cluster;
		serving->member = IN_CLUSTER;
		return SERVED;
	default:
		return BAD_KIND;
	}
}

// Checks that a flow is valid for a packet of its client. Returns SERVED, NEW if the packet begins a new flow, or the drop
// reason.
static inline int goes_on(const struct packet *p, struct ct_entry *entry)
{
	struct backend *backend;
	u32 generation, index = entry->backend;

	if (p->is.proto == UDP) {
		struct serving serving;
		struct choice choice;
		int result = serving_of(entry->service, entry->set, &serving);

		if (unlikely(result != SERVED))
			return result;
		return again(&serving, index, entry->generation, &choice) ? SERVED : NEW;
	}
	backend = map_lookup(&BACKENDS, &index);
	generation = backend ? READ_ONCE(backend->generation) : 0;
	if (begins(p)) {
		u8 one, other;

		if (generation != entry->generation || !(generation & 1))
			return NEW;
		one = READ_ONCE(entry->state);
		other = other_state(&p->is, entry);
		return (one | other) & SEEN_RST || one & other & SEEN_FIN ? NEW : SERVED;
	}
	if (unlikely(generation != entry->generation || !(generation & 1))) {
		touch(entry, RST, 1);
		return BACKEND_GONE;
	}
	return SERVED;
}

// Handles a packet of a known flow; returns NEW if the packet belongs to none.
static noinline int existing(struct __sk_buff *skb, const struct packet *p, int at_egress, struct outcome *outcome)
{
	struct ct_entry *entry = map_lookup(&CT, &p->is), copy;
	int is_new = 0, tcp = p->is.proto == TCP, result;
	struct hop hop;

	if (!entry) {
		entry = map_lookup(&CT_NEW, &p->is);
		if (!entry)
			return NEW;
		is_new = 1;
	}
	if (!!(entry->flags & EGRESS) != at_egress)
		return PASSED;
	if (unlikely(skb->vlan_present))
		return VLAN;
	outcome->service = entry->service;
	if (entry->flags & REPLY) {
		if (is_new && !(p->flags & RST)) {
			copy = *entry;
			result = establish(&p->is, &copy, p->flags);
			if (unlikely(result != SERVED))
				return result;
			entry = &copy;
		} else {
			touch(entry, p->flags, tcp);
		}
	} else {
		result = goes_on(p, entry);
		if (unlikely(result == NEW))
			forget(&p->is, entry);
		if (unlikely(result != SERVED))
			return result;
		touch(entry, p->flags, tcp);
		if (is_new && begins(p))
			claim_answers(&p->is, entry);
	}
	if (!(entry->flags & FORWARD))
		return deliver(skb, p, entry, outcome);
	result = route(skb, p, entry, &hop);
	if (unlikely(result != SERVED))
		return NO_ROUTE;
	return forward(skb, p, entry, &hop, at_egress, outcome);
}

// Returns the frontend word of a destination; zero if it is no frontend; ADDRESS for an unknown port of a Service address.
static inline u64 frontend(const struct ct_key *to, struct frontend_key *key)
{
	struct frontend *found;

	if (unlikely(is_loopback(or_loopback(to->dst))))
		return 0;
	*key = (struct frontend_key){ WORDS(to->dst), to->dst_port | to->proto << 16 };
	found = map_lookup(&FRONTENDS, key);
	if (found)
		return READ_ONCE(found->service_kind);
	key->port_proto = 0;
	if (map_lookup(&FRONTENDS, key))
		return (u64)ADDRESS << 32;
	if (!map_lookup(&NODE_ADDRS, key))
		return 0;
	// A node port is stored under the zero address of its family.
	key->port_proto = to->dst_port | to->proto << 16;
	if (!is_v4(to->dst))
		key->addr[0] = key->addr[1] = key->addr[2] = 0;
	key->addr[3] = 0;
	found = map_lookup(&FRONTENDS, key);
	return found ? READ_ONCE(found->service_kind) : 0;
}

// The selection for a new flow.
struct chosen {
	struct choice backend;
	u8 set;
	// True if the client is a pod of this node.
	u8 here;
};

static noinline int choose(const struct packet *p, u64 frontend, int at_egress, struct chosen *chosen)
{
	struct prefix client = { 128, WORDS(p->is.src) };
	u32 *place = map_lookup(&CLUSTER_CIDRS, &client);
	u32 is = place ? READ_ONCE(*place) : 0;
	u8 kind = frontend >> 32;
	struct serving serving;
	int result;

	chosen->here = !!(is & HERE);
	switch (kind) {
	case CLUSTER_IP:
		chosen->set = INTERNAL;
		break;
	case NODE_PORT:
	case EXTERNAL_IP:
	case LOAD_BALANCER:
		chosen->set = at_egress || is & INSIDE ? CLUSTER : EXTERNAL;
		break;
	default:
		return BAD_KIND;
	}
	result = serving_of(frontend, chosen->set, &serving);
	if (unlikely(result != SERVED))
		return result;
	if (unlikely(kind == LOAD_BALANCER && serving.flags & HAS_SOURCE_RANGES)) {
		struct source_range range = { 160, frontend, WORDS(p->is.src) };

		if (!map_lookup(&SOURCE_RANGES, &range))
			return SOURCE_NOT_ALLOWED;
	}
	if (unlikely(serving.flags & HAS_AFFINITY))
		return choose_by_affinity(&serving, p->is.src, CLIENT_ADDRESS, &chosen->backend);
	return any(&serving, &chosen->backend);
}

// Returns true if a socket of this node would receive the replies.
static noinline int hears(struct __sk_buff *skb, const struct ct_entry *entry, u32 proto)
{
	u16 src_port = __builtin_bswap16(entry->dst_port), dst_port = __builtin_bswap16(entry->src_port);
	union sock_tuple tuple;
	u32 length;
	void *sk;

	if (is_v4(entry->dst)) {
		tuple.v4.src = entry->dst.low >> 32;
		tuple.v4.dst = entry->src.low >> 32;
		tuple.v4.src_port = src_port;
		tuple.v4.dst_port = dst_port;
		length = sizeof(tuple.v4);
		sk = proto == TCP ? sk_lookup_tcp(skb, &tuple, length, CURRENT_NETNS, 0)
				  : sk_lookup_udp(skb, &tuple, length, CURRENT_NETNS, 0);
	} else {
		tuple.v6.src[0] = entry->dst.high;
		tuple.v6.src[1] = entry->dst.high >> 32;
		tuple.v6.src[2] = entry->dst.low;
		tuple.v6.src[3] = entry->dst.low >> 32;
		tuple.v6.dst[0] = entry->src.high;
		tuple.v6.dst[1] = entry->src.high >> 32;
		tuple.v6.dst[2] = entry->src.low;
		tuple.v6.dst[3] = entry->src.low >> 32;
		tuple.v6.src_port = src_port;
		tuple.v6.dst_port = dst_port;
		length = sizeof(tuple.v6);
		sk = proto == TCP ? sk_lookup_tcp(skb, &tuple, length, CURRENT_NETNS, 0)
				  : sk_lookup_udp(skb, &tuple, length, CURRENT_NETNS, 0);
	}
	if (!sk)
		return 0;
	sk_release(sk);
	return 1;
}

// Finds a source port for which no other flow and no socket receives the replies.
static noinline int claim_port(struct __sk_buff *skb, const struct ct_key *key, struct ct_entry *entry)
{
	u32 zero = 0;
	struct config *config = map_lookup(&CONFIG, &zero);
	u16 first, last;

	if (!config)
		return SNAT_PORTS_EXHAUSTED;
	first = READ_ONCE(config->snat_first);
	last = READ_ONCE(config->snat_last);
	if (unlikely(!first || last < first))
		return SNAT_PORTS_EXHAUSTED;
	for (int i = 0; i < PORTS_TRIED; ++i) {
		u64 ports = last - first + 1;

		entry->src_port = first + (u16)(get_prandom_u32() * ports >> 32);
		if (!hears(skb, entry, key->proto) && claim_answers(key, entry))
			return SERVED;
	}
	return SNAT_PORTS_EXHAUSTED;
}

// Handles a packet that belongs to no flow.
static noinline int begin(struct __sk_buff *skb, const struct packet *p, int at_egress, struct outcome *outcome)
{
	struct frontend_key key;
	struct ct_entry entry;
	struct chosen chosen;
	struct hop hop = {};
	int result, beyond, elsewhere, through;
	u64 found;

	outcome->service = 0;
	if (at_egress && !skb->sk) {
		key = (struct frontend_key){ WORDS(p->is.dst), 0 };
		return map_lookup(&FRONTENDS, &key) ? UNTRANSLATED : PASSED;
	}
	if (p->is.proto == TCP && !begins(p))
		return PASSED;
	found = frontend(&p->is, &key);
	if (!found)
		return PASSED;
	if ((u8)(found >> 32) == ADDRESS)
		return NO_SUCH_PORT;
	if (unlikely(skb->vlan_present))
		return VLAN;
	outcome->service = found;
	result = choose(p, found, at_egress, &chosen);
	if (unlikely(result != SERVED))
		return result;
	entry = (struct ct_entry){
		.src = p->is.src,
		.dst = chosen.backend.addr,
		.src_port = p->is.src_port,
		.dst_port = chosen.backend.port,
		.backend = chosen.backend.backend,
		.generation = chosen.backend.generation,
		.service = found,
		.seen = ktime_get_coarse_ns(),
		.set = chosen.set,
	};
	result = route(skb, p, &entry, &hop);
	if (unlikely(result == NO_ROUTE))
		return result;
	beyond = result == SERVED;
	if (unlikely(!beyond && at_egress))
		return NO_ROUTE;
	elsewhere = hop.device != skb->ifindex;
	through = !beyond || (!at_egress && elsewhere && (chosen.backend.flags & LOCAL || chosen.here));
	entry.flags = (at_egress ? EGRESS : 0) | (through ? 0 : FORWARD);
	if (through) {
		u32 index = skb->ifindex;
		struct device *device = map_lookup(&DEVICES, &index);

		if (device && READ_ONCE(device->flags) & BRIDGE)
			entry.flags |= AGAIN;
	}
	if (!through && (elsewhere || !at_egress)) {
		struct device *device = map_lookup(&DEVICES, &hop.device);

		if (unlikely(!device))
			return NO_SOURCE_ADDRESS;
		if (is_v4(p->is.src))
			entry.src = device->v4;
		else
			entry.src = device->v6;
		if (unlikely(!(entry.src.high | entry.src.low)))
			return NO_SOURCE_ADDRESS;
		result = claim_port(skb, &p->is, &entry);
	} else if (!claim_answers(&p->is, &entry)) {
		result = claim_port(skb, &p->is, &entry);
	} else {
		result = SERVED;
	}
	if (unlikely(result != SERVED))
		return result;
	entry.state = state_after(0, p->flags);
	if (unlikely(insert(&CT_NEW, &p->is, &entry))) {
		// Another packet of the flow has inserted the entry first.
		struct ct_key answers;
		struct ct_entry *known;

		other_key(&p->is, &entry, &answers);
		map_delete(&CT_NEW, &answers);
		known = map_lookup(&CT, &p->is);
		if (!known)
			known = map_lookup(&CT_NEW, &p->is);
		if (!known)
			return REWRITE_FAILED;
		entry = *known;
	}
	count(outcome->service, 1);
	event(TRANSLATED);
	if (entry.flags & FORWARD)
		return forward(skb, p, &entry, &hop, at_egress, outcome);
	return deliver(skb, p, &entry, outcome);
}

static noinline int refuse(u32 service, int reason)
{
	drop(reason);
	if (service)
		count(service, 0);
	event(REJECTED);
	return reason == VLAN ? UNSPEC : SHOT;
}

static inline int verdict(struct __sk_buff *skb, int at_egress)
{
	struct outcome outcome = { UNSPEC, 0 };
	struct packet p;
	int result = parse(skb, &p);

	if (result == PASSED)
		return UNSPEC;
	if (unlikely(result != SERVED)) {
		drop(result);
		return UNSPEC;
	}
	result = existing(skb, &p, at_egress, &outcome);
	if (result == NEW)
		result = begin(skb, &p, at_egress, &outcome);
	if (unlikely(result >= 0))
		return refuse(outcome.service, result);
	return outcome.verdict;
}

SEC("classifier")
int c_ingress(struct __sk_buff *skb)
{
	return verdict(skb, 0);
}

SEC("classifier")
int c_egress(struct __sk_buff *skb)
{
	return verdict(skb, 1);
}

SEC("classifier")
int c_empty(struct __sk_buff *skb)
{
	return UNSPEC;
}

// Headers of the packets of a measurement.
struct headers {
	u32 length;
	// Offset of the source port, the port of the next packet, and the increment per packet.
	u32 port_at;
	u16 port, step;
	u8 bytes[HEADERS];
	u8 pad[2];
};

struct {
	__uint(type, MAP_ARRAY);
	__uint(max_entries, 1);
	__type(key, u32);
	__type(value, struct headers);
} PACKETS SEC(".maps");

struct {
	__uint(type, MAP_PROG_ARRAY);
	__uint(max_entries, 1);
	__uint(key_size, 4);
	__uint(value_size, 4);
} MEASURED SEC(".maps");

// Each run receives the packet that the previous run has changed. This program restores the original headers, or writes those
// of the next packet, and tail-calls the measured program.
SEC("classifier")
int c_again(struct __sk_buff *skb)
{
	u32 zero = 0;
	struct headers *headers = map_lookup(&PACKETS, &zero);
	u32 length, at;

	if (!headers)
		return SHOT;
	length = headers->length;
	at = headers->port_at;
	if (!length || length > HEADERS || at > HEADERS - 2)
		return SHOT;
	headers->bytes[at] = headers->port >> 8;
	headers->bytes[at + 1] = headers->port;
	headers->port += headers->step;
	if (store(skb, 0, headers->bytes, length, 0))
		return SHOT;
	tail_call(skb, &MEASURED, 0);
	return SHOT;
}

// Some helpers are available only to programs under this license.
char LICENSE[] SEC("license") = "Dual MIT/GPL";
