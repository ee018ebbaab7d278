// Reference programs of `cargo xtask bench`, on the maps that the agent created and filled: the work of lb's programs on
// sockets, written by hand in C, an empty program for each hook, and for the connect hooks the floor and programs with some of lb's
// steps.
//
// Trace events are left out. The programs look up whether tracing is enabled, and count events as lost if it is.

#include "lb.h"

// UAPI: the context of cgroup programs on socket addresses.
struct bpf_sock_addr {
	u32 user_family;
	u32 user_ip4;
	u32 user_ip6[4];
	u32 user_port;
	u32 family;
	u32 type;
	u32 protocol;
	u32 msg_src_ip4;
	u32 msg_src_ip6[4];
	void *sk __attribute__((aligned(8)));
};

// UAPI: the part of the context of cgroup programs on sockets that is used here.
struct bpf_sock {
	u32 bound_dev_if;
	u32 family;
	u32 type;
	u32 protocol;
};

// UAPI: a spin lock, which the kernel recognizes by the name of its type.
struct bpf_spin_lock {
	u32 val;
};

static u64 (*ktime_get_ns)(void) = (void *)5;
static u64 (*get_socket_cookie)(void *ctx) = (void *)46;
static long (*spin_lock)(struct bpf_spin_lock *lock) = (void *)93;
static long (*spin_unlock)(struct bpf_spin_lock *lock) = (void *)94;
static u64 (*get_netns_cookie)(void *ctx) = (void *)122;
static long (*set_retval)(int value) = (void *)187;
static void *(*skc_to_mptcp_sock)(void *sk) = (void *)196;

struct record {
	u64 cookie;
	u32 sequence, spilled;
	u64 netns, time;
	struct addr original_addr, backend_addr;
	u16 original_port, backend_port;
	u32 backend, generation, service;
	u64 socket;
	u8 proto, pad[7];
	u64 reserved[4];
};

enum { FLOWS = 4 };

struct flow {
	struct addr vip, backend_addr;
	u16 vip_port, backend_port;
	u32 backend, generation, service;
	u64 asked;
	u32 unanswered, pad;
};

struct flows {
	struct bpf_spin_lock lock;
	u32 pad;
	u64 netns;
	struct flow flows[FLOWS];
};

struct {
	__uint(type, MAP_ARRAY);
	__uint(max_entries, 1);
	__uint(map_flags, MMAPABLE);
	__type(key, u32);
	__type(value, struct record);
} SOCKETS SEC(".maps");

struct {
	__uint(type, MAP_HASH);
	__uint(max_entries, 1);
	__uint(map_flags, NO_PREALLOC);
	__type(key, u64);
	__type(value, struct record);
} SOCKETS_MORE SEC(".maps");

struct {
	__uint(type, MAP_HASH);
	__uint(max_entries, 1);
	__uint(map_flags, NO_PREALLOC);
	__type(key, u64);
	__type(value, struct flows);
} UDP_FLOWS SEC(".maps");

struct {
	__uint(type, MAP_ARRAY);
	__uint(max_entries, 1);
	__uint(map_flags, MMAPABLE);
	__type(key, u32);
	__type(value, u64);
} FILTER SEC(".maps");

// Set by the loader: the number of slots in SOCKETS minus one, the cookie of the node's network namespace, and a flag for
// serving only that namespace.
const volatile u32 SOCKETS_MASK = 0;
const volatile u64 NODE_NETNS = 0;
const volatile u32 NODE_ONLY = 0;

enum { DENY = 0, ALLOW = 1 };
enum { TCP = 6, UDP = 17, MPTCP = 262 };

// A destination or a peer. Port in host byte order.
struct end {
	struct addr addr;
	u16 port;
	u8 proto;
};

static inline struct end end_of(struct bpf_sock_addr *ctx, int v6)
{
	struct end end = { .port = __builtin_bswap16(ctx->user_port), .proto = ctx->protocol };

	if (v6) {
		const volatile u64 *words = (const volatile u64 *)ctx->user_ip6;

		end.addr.high = words[0];
		end.addr.low = words[1];
	} else {
		end.addr = mapped(ctx->user_ip4);
	}
	return end;
}

// Writes an address, which must be of the hook's family, and a port to the context.
static inline void write_end(struct bpf_sock_addr *ctx, struct addr addr, u16 port, int v6)
{
	if (v6) {
		volatile u64 *words = (volatile u64 *)ctx->user_ip6;

		words[0] = addr.high;
		words[1] = addr.low;
	} else {
		ctx->user_ip4 = addr.low >> 32;
	}
	ctx->user_port = __builtin_bswap16(port);
}

static inline int set_end(struct bpf_sock_addr *ctx, struct addr addr, u16 port, int v6)
{
	if (!v6 && unlikely(!is_v4(addr)))
		return 0;
	write_end(ctx, addr, port, v6);
	return 1;
}

static inline int refuse(u32 service, int reason)
{
	drop(reason);
	if (service)
		count(service, 0);
	event(REFUSED);
	set_retval(reason == NO_LOCAL_ENDPOINT					  ? -113
		   : reason == UDP_SOCKETS_FULL || reason == UDP_FLOWS_FULL ? -12
									  : -111);
	return DENY;
}

// Returns the frontend word of a destination, of kind ADDRESS for an unknown port of a Service address; zero if it is no
// frontend.
static inline u64 frontend(struct bpf_sock_addr *ctx, struct end to)
{
	struct addr addr = or_loopback(to.addr);
	u32 port_proto = to.port | to.proto << 16;
	struct frontend_key key = {
		{ addr.high, addr.high >> 32, addr.low, addr.low >> 32 },
		port_proto,
	};
	struct frontend *found;

	if (unlikely(is_loopback(addr))) {
		if (get_netns_cookie(ctx) != NODE_NETNS)
			return 0;
	} else {
		found = map_lookup(&FRONTENDS, &key);
		if (found)
			return READ_ONCE(found->service_kind);
		key.port_proto = 0;
		if (map_lookup(&FRONTENDS, &key))
			return (u64)ADDRESS << 32;
		if (!map_lookup(&NODE_ADDRS, &key))
			return 0;
	}
	// A node port is stored under the zero address of its family.
	key.port_proto = port_proto;
	if (!is_v4(addr))
		key.addr[0] = key.addr[1] = key.addr[2] = 0;
	key.addr[3] = 0;
	found = map_lookup(&FRONTENDS, &key);
	return found ? READ_ONCE(found->service_kind) : 0;
}

// Looks up the service port and the set that serve a destination. Returns SERVED, PASSED, or the drop reason.
static inline int serve(struct bpf_sock_addr *ctx, struct end to, struct serving *serving)
{
	u64 word;

	if (NODE_ONLY && get_netns_cookie(ctx) != NODE_NETNS)
		return PASSED;
	word = frontend(ctx, to);
	if (!word)
		return PASSED;
	serving->service = word;
	if ((u8)(word >> 32) == ADDRESS)
		return NO_SUCH_PORT;
	serving->entry = map_lookup(&SERVICES, &serving->service);
	if (!serving->entry)
		return BAD_SERVICE_INDEX;
	serving->flags = READ_ONCE(serving->entry->flags);
	switch ((u8)(word >> 32)) {
	case CLUSTER_IP:
		serving->set = &serving->entry->internal;
		serving->member = IN_INTERNAL;
		return SERVED;
	case LOAD_BALANCER:
		if (serving->flags & HAS_SOURCE_RANGES)
			return PASSED;
	case NODE_PORT:
	case EXTERNAL_IP:
		serving->set = &serving->entry->cluster;
		serving->member = IN_CLUSTER;
		return SERVED;
	default:
		return BAD_KIND;
	}
}

static inline int choose(struct bpf_sock_addr *ctx, const struct serving *serving, struct choice *choice)
{
	if (unlikely(serving->flags & HAS_AFFINITY))
		return choose_by_affinity(serving, (struct addr){ 0, get_netns_cookie(ctx) }, CLIENT_NETNS, choice);
	return any(serving, choice);
}

static inline struct record *slot_of(u64 cookie)
{
	u32 index = (u32)cookie & SOCKETS_MASK;

	return map_lookup(&SOCKETS, &index);
}

static inline struct record *record_of(u64 cookie)
{
	struct record *record = slot_of(cookie);

	if (!record || READ_ONCE(record->cookie) == cookie)
		return record;
	return unlikely(READ_ONCE(record->spilled)) ? map_lookup(&SOCKETS_MORE, &cookie) : 0;
}

static inline u32 opened(u32 sequence)
{
	return sequence | 1;
}

static inline u32 closed(u32 sequence)
{
	u32 next = opened(sequence) + 1;

	return next ? next : 2;
}

// Writes the fields of a record that describe its connection.
static inline void fill_connection(struct record *record, u64 cookie, struct end to, const struct choice *choice,
				   u32 service)
{
	record->original_addr = to.addr;
	record->backend_addr = choice->addr;
	record->original_port = to.port;
	record->backend_port = choice->port;
	record->backend = choice->backend;
	record->generation = choice->generation;
	record->service = service;
	record->socket = cookie;
	record->proto = to.proto;
}

static inline void fill(struct record *record, struct bpf_sock_addr *ctx, u64 cookie, struct end to,
			const struct choice *choice, u32 service)
{
	record->netns = get_netns_cookie(ctx);
	record->time = ktime_get_coarse_ns();
	fill_connection(record, cookie, to, choice, service);
}

static inline long remember_more(u64 key, struct bpf_sock_addr *ctx, u64 cookie, struct end to,
				 const struct choice *choice, u32 service)
{
	struct record more = { .cookie = key, .sequence = 2 };

	fill(&more, ctx, cookie, to, choice, service);
	return map_update(&SOCKETS_MORE, &key, &more, ANY);
}

// Stores the record of a socket; returns false if the map is full.
static inline int remember(struct bpf_sock_addr *ctx, struct end to, const struct choice *choice, u32 service)
{
	u64 cookie = get_socket_cookie(ctx);
	void *mptcp = to.proto == TCP ? skc_to_mptcp_sock(ctx->sk) : 0;
	struct record *record;
	u64 holder;

	if (unlikely(mptcp))
		return !remember_more((u64)mptcp, ctx, cookie, to, choice, service);
	record = slot_of(cookie);
	if (!record)
		return 0;
	holder = READ_ONCE(record->cookie);
	if (holder == cookie) {
		__sync_lock_test_and_set(&record->sequence, opened(record->sequence));
	} else if (unlikely(holder || READ_ONCE(record->spilled) ||
			    __sync_val_compare_and_swap(&record->cookie, 0, cookie) != 0)) {
		int known = map_lookup(&SOCKETS_MORE, &cookie) != 0;

		if (!known)
			__sync_fetch_and_add(&record->spilled, 1);
		if (!remember_more(cookie, ctx, cookie, to, choice, service))
			return 1;
		if (!known)
			__sync_fetch_and_add(&record->spilled, -1);
		return 0;
	}
	fill(record, ctx, cookie, to, choice, service);
	__sync_lock_test_and_set(&record->sequence, closed(record->sequence));
	return 1;
}

static inline void forget(u64 cookie)
{
	struct record *record = slot_of(cookie);

	if (!record)
		return;
	if (READ_ONCE(record->cookie) == cookie) {
		WRITE_ONCE(record->sequence, opened(record->sequence));
		__sync_lock_test_and_set(&record->cookie, 0);
	} else if (unlikely(READ_ONCE(record->spilled)) && map_delete(&SOCKETS_MORE, &cookie) == 0) {
		__sync_fetch_and_add(&record->spilled, -1);
	}
}

static inline int connect(struct bpf_sock_addr *ctx, int v6)
{
	struct end to = end_of(ctx, v6);
	struct serving serving = {};
	struct choice choice = {};
	int result = serve(ctx, to, &serving);

	if (result == PASSED) {
		if (to.proto == UDP)
			forget(get_socket_cookie(ctx));
		return ALLOW;
	}
	if (result != SERVED)
		return refuse(serving.service, result);
	result = choose(ctx, &serving, &choice);
	if (result != SERVED)
		return refuse(serving.service, result);
	if (unlikely(!remember(ctx, to, &choice, serving.service))) {
		if (to.proto == UDP)
			return refuse(serving.service, UDP_SOCKETS_FULL);
		drop(SOCKETS_FULL);
	}
	if (!set_end(ctx, choice.addr, choice.port, v6))
		return refuse(serving.service, BAD_FAMILY);
	count(serving.service, 1);
	event(CONNECTED);
	return ALLOW;
}

// The floor: the least that a load balancer without sets in its frontends can do at a connect hook on these maps. A hit reads FRONTENDS, SERVICES and
// BACKEND_SLOTS, and a miss reads FRONTENDS only. It serves cluster IPs over TCP. It has no affinity, address marks, node
// ports, socket records, counters, events, or check of the network namespace.
static inline int floor_connect(struct bpf_sock_addr *ctx, int v6)
{
	struct end to = end_of(ctx, v6);
	struct frontend_key key = {
		{ to.addr.high, to.addr.high >> 32, to.addr.low, to.addr.low >> 32 },
		to.port | to.proto << 16,
	};
	struct frontend *found = map_lookup(&FRONTENDS, &key);
	struct service *entry;
	struct slot *slot;
	u32 service, index;
	u64 set;
	u16 len;

	if (!found)
		return ALLOW;
	service = READ_ONCE(found->service_kind);
	entry = map_lookup(&SERVICES, &service);
	if (!entry)
		return DENY;
	set = READ_ONCE(entry->internal);
	len = set >> 32;
	if (unlikely(!len))
		return DENY;
	index = (u32)set + (u32)((u64)get_prandom_u32() * len >> 32);
	slot = map_lookup(&BACKEND_SLOTS, &index);
	if (!slot)
		return DENY;
	write_end(ctx, slot->addr, slot->port, v6);
	return ALLOW;
}

// Steps of lb's connect hooks that the floor does not have. A program with one of them has all steps with lower numbers.
enum {
	STEP_CHECKS = 1, // Loopback and zero addresses, the service of the slot, the family of the backend.
	STEP_FILTER,
	STEP_COOKIE, // Selection by the cookie of the socket and the time. Without it the kernel's random number selects.
	STEP_NETNS,
	STEP_MPTCP,
	STEP_RECORD,
	STEP_COUNTER,
	STEP_TRACE,
};

// The hash of `lb-common/src/mix.rs`.
static inline u64 mix(u64 word)
{
	word = (word ^ word >> 30) * 0xbf58476d1ce4e5b9ull;
	return (word ^ word >> 27) * 0x94d049bb133111ebull;
}

// Returns whether the address has its bit in FILTER: see `lb-common/src/abi/filter.rs`.
static inline int may_have(struct addr addr)
{
	u32 bit = mix(addr.high * 0x9e3779b97f4a7c15ull ^ (addr.low & ~0ull >> 8)) >> 47;
	u32 index = bit / 64;
	u64 *word = map_lookup(&FILTER, &index);

	return !word || READ_ONCE(*word) >> bit % 64 & 1;
}

// Values of a record that a program has read before it stores the record.
struct origin {
	u64 cookie, netns, time;
};

// Stores the record of a socket. Leaves a socket without a slot of its own to `remember`.
static inline int remember_known(struct bpf_sock_addr *ctx, struct end to, const struct choice *choice, u32 service,
				 const struct origin *origin)
{
	u64 cookie = origin->cookie;
	struct record *record = slot_of(cookie);
	u64 holder;

	if (!record)
		return 0;
	holder = READ_ONCE(record->cookie);
	if (holder == cookie)
		__sync_lock_test_and_set(&record->sequence, opened(record->sequence));
	else if (unlikely(holder || READ_ONCE(record->spilled) ||
			  __sync_val_compare_and_swap(&record->cookie, 0, cookie) != 0))
		return remember(ctx, to, choice, service);
	record->netns = origin->netns;
	record->time = origin->time;
	fill_connection(record, cookie, to, choice, service);
	__sync_lock_test_and_set(&record->sequence, closed(record->sequence));
	return 1;
}

// The work of lb's connect hooks for a cluster IP over TCP, in the order of lb, with the steps up to `last`, a constant. It serves
// Services that have their set in FRONTENDS, and no MPTCP sockets.
static inline int connect_up_to(struct bpf_sock_addr *ctx, int v6, const int last)
{
	struct end to = end_of(ctx, v6);
	struct addr addr = last >= STEP_CHECKS ? or_loopback(to.addr) : to.addr;
	struct frontend_key key = {
		{ addr.high, addr.high >> 32, addr.low, addr.low >> 32 },
		to.port | to.proto << 16,
	};
	u32 service, index, number;
	struct origin origin = {};
	struct frontend *found;
	struct record *record;
	struct choice choice;
	struct stats *stats;
	struct slot *slot;
	u64 set;
	u16 len;

	if (last >= STEP_CHECKS && unlikely(is_loopback(addr)))
		return ALLOW;
	if (last >= STEP_FILTER && !may_have(addr))
		return ALLOW;
	found = map_lookup(&FRONTENDS, &key);
	if (!found)
		return ALLOW;
	service = READ_ONCE(found->service_kind);
	set = READ_ONCE(found->set);
	if (last >= STEP_COOKIE)
		origin.cookie = get_socket_cookie(ctx);
	// The record and the counter are loaded early, so that the processor waits for both and the slot at once.
	if (last >= STEP_RECORD) {
		record = slot_of(origin.cookie);
		if (record)
			READ_ONCE(record->cookie);
	}
	if (last >= STEP_COUNTER) {
		stats = map_lookup(&STATS, &service);
		if (stats)
			READ_ONCE(stats->connections);
	}
	if (last >= STEP_COOKIE) {
		origin.time = ktime_get_coarse_ns();
		number = mix(origin.cookie ^ (origin.time << 32 | origin.time >> 32)) >> 32;
	} else {
		number = get_prandom_u32();
	}
	if (last >= STEP_NETNS)
		origin.netns = get_netns_cookie(ctx);
	len = set >> 32;
	if (unlikely(!len))
		return DENY;
	index = (u32)set + (u32)((u64)number * len >> 32);
	slot = map_lookup(&BACKEND_SLOTS, &index);
	if (!slot || (last >= STEP_CHECKS && unlikely(READ_ONCE(slot->service) != service)))
		return DENY;
	choice = (struct choice){ slot->addr, slot->port, slot->flags, slot->backend, slot->generation };
	if (last >= STEP_MPTCP && to.proto == TCP && unlikely(skc_to_mptcp_sock(ctx->sk) != 0))
		return DENY;
	if (last >= STEP_RECORD && unlikely(!remember_known(ctx, to, &choice, service, &origin)))
		drop(SOCKETS_FULL);
	if (last >= STEP_CHECKS && !v6 && unlikely(!is_v4(choice.addr)))
		return DENY;
	write_end(ctx, choice.addr, choice.port, v6);
	if (last >= STEP_COUNTER)
		count(service, 1);
	if (last >= STEP_TRACE)
		event(CONNECTED);
	return ALLOW;
}

static const struct flows EMPTY;

static inline int is_to(const struct flow *flow, struct end to)
{
	return flow->vip_port == to.port && is_same(flow->vip, to.addr);
}

static inline struct choice choice_of(const struct flow *flow)
{
	return (struct choice){
		.addr = flow->backend_addr,
		.port = flow->backend_port,
		.backend = flow->backend,
		.generation = flow->generation,
	};
}

static inline u64 since(u64 before, u64 now)
{
	return now > before ? now - before : 0;
}

// Sends to a destination again: returns the backend that the socket has for it, if any.
static inline int ask(struct flows *flows, struct end to, u64 now, struct choice *choice)
{
	int found = 0;

	spin_lock(&flows->lock);
#pragma unroll
	for (int i = 0; i < FLOWS; i++) {
		struct flow *flow = &flows->flows[i];

		if (!is_to(flow, to))
			continue;
		*choice = choice_of(flow);
		if (flow->unanswered && since(flow->asked, now) < SECOND) {
			flow->unanswered += flow->unanswered != ~0u;
		} else {
			flow->asked = now;
			flow->unanswered = 1;
		}
		found = 1;
		break;
	}
	spin_unlock(&flows->lock);
	return found;
}

// Assigns a backend for the destination to the socket and replaces `old`; a selection that another thread has stored
// concurrently is kept.
static inline int claim(struct flows *flows, struct end to, const struct choice *old, struct choice *new, u32 service,
			u64 netns, u64 now)
{
	struct flow *place = &flows->flows[0];
	u64 oldest = ~0ull;
	int known = 0, replaced;

	spin_lock(&flows->lock);
#pragma unroll
	for (int i = 0; i < FLOWS; i++) {
		struct flow *flow = &flows->flows[i];

		if (is_to(flow, to)) {
			place = flow;
			known = 1;
			break;
		}
		if (flow->asked < oldest) {
			oldest = flow->asked;
			place = flow;
		}
	}
	if (known && !(old && old->backend == place->backend && old->generation == place->generation)) {
		*new = choice_of(place);
		spin_unlock(&flows->lock);
		return 0;
	}
	replaced = !known && place->vip_port;
	place->vip = to.addr;
	place->backend_addr = new->addr;
	place->vip_port = to.port;
	place->backend_port = new->port;
	place->backend = new->backend;
	place->generation = new->generation;
	place->service = service;
	place->asked = now;
	place->unanswered = 1;
	flows->netns = netns;
	spin_unlock(&flows->lock);
	return replaced;
}

static inline int choose_for_flow(struct bpf_sock_addr *ctx, u64 cookie, struct end to, const struct serving *serving,
				  struct choice *choice)
{
	u64 now = ktime_get_ns();
	struct flows *flows = map_lookup(&UDP_FLOWS, &cookie);
	struct choice old = {};
	int known = flows && ask(flows, to, now, &old);
	int result;

	if (known && again(serving, old.backend, old.generation, choice))
		return SERVED;
	result = choose(ctx, serving, choice);
	if (result != SERVED)
		return result;
	if (!flows) {
		map_update(&UDP_FLOWS, &cookie, &EMPTY, NOEXIST);
		flows = map_lookup(&UDP_FLOWS, &cookie);
		if (!flows)
			return UDP_FLOWS_FULL;
	}
	if (claim(flows, to, known ? &old : 0, choice, serving->service, get_netns_cookie(ctx), now))
		drop(UDP_FLOW_REPLACED);
	count(serving->service, 1);
	return SERVED;
}

static inline int sendmsg(struct bpf_sock_addr *ctx, int v6)
{
	struct end to = end_of(ctx, v6);
	struct serving serving = {};
	struct choice choice = {};
	struct record *record;
	int result = serve(ctx, to, &serving);
	u64 cookie;

	if (result == PASSED)
		return ALLOW;
	if (result != SERVED)
		return refuse(serving.service, result);
	cookie = get_socket_cookie(ctx);
	record = record_of(cookie);
	if (!(record && record->original_port == to.port && is_same(record->original_addr, to.addr) &&
	      again(&serving, record->backend, record->generation, &choice))) {
		result = choose_for_flow(ctx, cookie, to, &serving, &choice);
		if (result != SERVED)
			return refuse(serving.service, result);
	}
	if (!set_end(ctx, choice.addr, choice.port, v6))
		return refuse(serving.service, BAD_FAMILY);
	event(SENT);
	return ALLOW;
}

static inline int is_from(const struct record *record, struct end peer)
{
	return record->backend_port == peer.port && is_same(record->backend_addr, peer.addr);
}

// Replaces the source of a reply by the destination that the socket sent to.
static inline void answer(struct bpf_sock_addr *ctx, struct flows *flows, struct end from, int v6)
{
	u64 now = ktime_get_ns();
	struct flow *best = 0;
	u64 best_claim = 0;
	struct addr vip;
	u16 port;

	spin_lock(&flows->lock);
#pragma unroll
	for (int i = 0; i < FLOWS; i++) {
		struct flow *flow = &flows->flows[i];
		u64 claim;

		if (flow->backend_port != from.port || !is_same(flow->backend_addr, from.addr))
			continue;
		claim = flow->asked;
		if (flow->unanswered && since(flow->asked, now) < SECOND)
			claim = ~flow->asked;
		if (claim >= best_claim) {
			best_claim = claim;
			best = flow;
		}
	}
	if (!best) {
		spin_unlock(&flows->lock);
		return;
	}
	if (best->unanswered > 1)
		best->asked = now;
	best->unanswered -= best->unanswered != 0;
	vip = best->vip;
	port = best->vip_port;
	spin_unlock(&flows->lock);
	set_end(ctx, vip, port, v6);
}

static inline int recvmsg(struct bpf_sock_addr *ctx, int v6)
{
	struct end from = end_of(ctx, v6);
	u64 cookie = get_socket_cookie(ctx);
	struct record *record = record_of(cookie);
	struct flows *flows;

	if (record && is_from(record, from)) {
		set_end(ctx, record->original_addr, record->original_port, v6);
		return ALLOW;
	}
	flows = map_lookup(&UDP_FLOWS, &cookie);
	if (flows)
		answer(ctx, flows, from, v6);
	return ALLOW;
}

static inline int getpeername(struct bpf_sock_addr *ctx, int v6)
{
	struct end peer = end_of(ctx, v6);
	struct record *record;

	if (unlikely(ctx->protocol == MPTCP)) {
		u64 key = (u64)ctx->sk;

		record = map_lookup(&SOCKETS_MORE, &key);
	} else {
		record = record_of(get_socket_cookie(ctx));
	}
	if (record && is_from(record, peer))
		set_end(ctx, record->original_addr, record->original_port, v6);
	return ALLOW;
}

SEC("cgroup/connect4") int c_connect4(struct bpf_sock_addr *ctx)
{
	return connect(ctx, 0);
}

SEC("cgroup/connect6") int c_connect6(struct bpf_sock_addr *ctx)
{
	return connect(ctx, 1);
}

SEC("cgroup/sendmsg4") int c_sendmsg4(struct bpf_sock_addr *ctx)
{
	return sendmsg(ctx, 0);
}

SEC("cgroup/sendmsg6") int c_sendmsg6(struct bpf_sock_addr *ctx)
{
	return sendmsg(ctx, 1);
}

SEC("cgroup/recvmsg4") int c_recvmsg4(struct bpf_sock_addr *ctx)
{
	return recvmsg(ctx, 0);
}

SEC("cgroup/recvmsg6") int c_recvmsg6(struct bpf_sock_addr *ctx)
{
	return recvmsg(ctx, 1);
}

SEC("cgroup/getpeername4") int c_getpeername4(struct bpf_sock_addr *ctx)
{
	return getpeername(ctx, 0);
}

SEC("cgroup/getpeername6") int c_getpeername6(struct bpf_sock_addr *ctx)
{
	return getpeername(ctx, 1);
}

SEC("cgroup/sock_release") int c_sock_release(struct bpf_sock *ctx)
{
	u64 cookie;

	if (unlikely(ctx->protocol == MPTCP)) {
		u64 key = (u64)ctx;

		map_delete(&SOCKETS_MORE, &key);
		return ALLOW;
	}
	cookie = get_socket_cookie(ctx);
	forget(cookie);
	if (ctx->protocol == UDP)
		map_delete(&UDP_FLOWS, &cookie);
	return ALLOW;
}

SEC("cgroup/connect4") int floor_connect4(struct bpf_sock_addr *ctx)
{
	return floor_connect(ctx, 0);
}

SEC("cgroup/connect6") int floor_connect6(struct bpf_sock_addr *ctx)
{
	return floor_connect(ctx, 1);
}

// Defines the programs with the steps up to `last`.
#define CONNECT_UP_TO(name, last)                                            \
	SEC("cgroup/connect4") int name##_connect4(struct bpf_sock_addr *ctx) \
	{                                                                    \
		return connect_up_to(ctx, 0, last);                          \
	}                                                                    \
	SEC("cgroup/connect6") int name##_connect6(struct bpf_sock_addr *ctx) \
	{                                                                    \
		return connect_up_to(ctx, 1, last);                          \
	}

CONNECT_UP_TO(all, STEP_TRACE)
CONNECT_UP_TO(no_trace, STEP_COUNTER)
CONNECT_UP_TO(no_counter, STEP_RECORD)
CONNECT_UP_TO(no_record, STEP_MPTCP)
CONNECT_UP_TO(no_mptcp, STEP_NETNS)
CONNECT_UP_TO(no_netns, STEP_COOKIE)
CONNECT_UP_TO(no_cookie, STEP_FILTER)
CONNECT_UP_TO(no_filter, STEP_CHECKS)
CONNECT_UP_TO(no_checks, 0)

SEC("cgroup/connect4") int empty_connect4(struct bpf_sock_addr *ctx)
{
	return ALLOW;
}

SEC("cgroup/connect6") int empty_connect6(struct bpf_sock_addr *ctx)
{
	return ALLOW;
}

SEC("cgroup/sendmsg4") int empty_sendmsg4(struct bpf_sock_addr *ctx)
{
	return ALLOW;
}

SEC("cgroup/sendmsg6") int empty_sendmsg6(struct bpf_sock_addr *ctx)
{
	return ALLOW;
}

SEC("cgroup/recvmsg4") int empty_recvmsg4(struct bpf_sock_addr *ctx)
{
	return ALLOW;
}

SEC("cgroup/recvmsg6") int empty_recvmsg6(struct bpf_sock_addr *ctx)
{
	return ALLOW;
}

SEC("cgroup/getpeername4") int empty_getpeername4(struct bpf_sock_addr *ctx)
{
	return ALLOW;
}

SEC("cgroup/getpeername6") int empty_getpeername6(struct bpf_sock_addr *ctx)
{
	return ALLOW;
}

SEC("cgroup/sock_release") int empty_sock_release(struct bpf_sock *ctx)
{
	return ALLOW;
}

char LICENSE[] SEC("license") = "Dual MIT/GPL";
