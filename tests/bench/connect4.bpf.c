// The yardstick of `cargo xtask bench connect`: the work of lb_connect4, lb_getpeername4 and lb_sock_release, written by
// hand in C, on the very maps that the agent made and filled. And a program that does nothing, for each hook.
//
// Layouts are those of lb-common/src/abi. Needs no header: what it takes from the kernel's (linux/bpf.h) is below.
// Left out: events of refused connections, which nobody asks for in the benchmark.

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "written for little-endian machines: addresses and ports are put together in words"
#endif

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#define SEC(name) __attribute__((section(name), used))
#define __uint(name, value) int (*name)[value]
#define __type(name, value) typeof(value) *name
#define inline inline __attribute__((always_inline))
#define unlikely(x) __builtin_expect(!!(x), 0)

enum { MAP_HASH = 1, MAP_ARRAY = 2, MAP_PERCPU_ARRAY = 6, NO_PREALLOC = 1 << 0, MMAPABLE = 1 << 10 };

// UAPI: the context of cgroup programs on socket addresses.
struct bpf_sock_addr {
	u32 user_family;
	u32 user_ip4;
	u32 user_ip6[4];
	u32 user_port;
	u32 family;
	u32 type;
	u32 protocol;
};

static void *(*map_lookup)(void *map, const void *key) = (void *)1;
static long (*map_update)(void *map, const void *key, const void *value, u64 flags) = (void *)2;
static long (*map_delete)(void *map, const void *key) = (void *)3;
static u32 (*get_prandom_u32)(void) = (void *)7;
static u64 (*get_socket_cookie)(void *ctx) = (void *)46;
static u64 (*get_netns_cookie)(void *ctx) = (void *)122;
static u64 (*ktime_get_coarse_ns)(void) = (void *)160;
static long (*set_retval)(int value) = (void *)187;

// An IPv4 address, v4-mapped, as two words.
struct addr {
	u64 high, low;
};

// The last word: port, and the protocol above it. Whole words, since the lookup reads what was just written.
struct frontend_key {
	u32 addr[4];
	u32 port_proto;
};

struct service {
	u64 internal, external, cluster;
	u32 flags, affinity_timeout, generation, pad;
};

struct slot {
	struct addr addr;
	u16 port, flags;
	u32 backend, generation, pad;
};

struct record {
	u64 cookie;
	u32 sequence, spilled;
	u64 netns, time;
	struct addr original_addr, backend_addr;
	u16 original_port, backend_port;
	u32 backend, generation, service;
};

struct stats {
	u64 connections, refused;
};

// Sizes are those of the pinned maps.
struct {
	__uint(type, MAP_HASH);
	__uint(max_entries, 1);
	__type(key, struct frontend_key);
	__type(value, u64);
} FRONTENDS SEC(".maps");

struct {
	__uint(type, MAP_ARRAY);
	__uint(max_entries, 1);
	__uint(map_flags, MMAPABLE);
	__type(key, u32);
	__type(value, struct service);
} SERVICES SEC(".maps");

struct {
	__uint(type, MAP_ARRAY);
	__uint(max_entries, 1);
	__uint(map_flags, MMAPABLE);
	__type(key, u32);
	__type(value, struct slot);
} BACKEND_SLOTS SEC(".maps");

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
	__uint(type, MAP_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, u32);
	__type(value, struct stats);
} STATS SEC(".maps");

struct {
	__uint(type, MAP_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, u32);
	__type(value, u64);
} DROPS SEC(".maps");

// Number of slots in SOCKETS, less one: set by the loader.
const volatile u32 SOCKETS_MASK = 0;

enum { DENY = 0, ALLOW = 1 };
enum { NO_ENDPOINT, NO_LOCAL_ENDPOINT, NO_SUCH_PORT, BAD_SERVICE_INDEX, BAD_SLOT, BAD_FAMILY, BAD_KIND, SOCKETS_FULL };
enum { ADDRESS = 1, CLUSTER_IP, NODE_PORT, EXTERNAL_IP, LOAD_BALANCER };
enum { EMPTY_DROPS = 1 };

#define MAPPED __builtin_bswap32(0xffff)

static inline struct addr mapped(u32 v4)
{
	return (struct addr){ 0, (u64)v4 << 32 | MAPPED };
}

static inline void drop(u32 reason)
{
	u64 *count = map_lookup(&DROPS, &reason);

	if (count)
		++*count;
}

static inline void count(u32 service, int connected)
{
	struct stats *stats = map_lookup(&STATS, &service);

	if (!stats)
		return;
	if (connected)
		++stats->connections;
	else
		++stats->refused;
}

static inline int refuse(u32 service, u32 reason)
{
	drop(reason);
	if (service)
		count(service, 0);
	set_retval(reason == NO_LOCAL_ENDPOINT ? -113 : -111);
	return DENY;
}

static inline struct record *slot_of(u64 cookie)
{
	u32 index = (u32)cookie & SOCKETS_MASK;

	return map_lookup(&SOCKETS, &index);
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

static inline void fill(struct record *record, struct bpf_sock_addr *ctx, u32 ip, u16 port, const struct slot *slot,
			u32 service)
{
	record->netns = get_netns_cookie(ctx);
	record->time = ktime_get_coarse_ns();
	record->original_addr = mapped(ip);
	record->backend_addr = slot->addr;
	record->original_port = port;
	record->backend_port = slot->port;
	record->backend = slot->backend;
	record->generation = slot->generation;
	record->service = service;
}

static inline void remember(struct bpf_sock_addr *ctx, u32 ip, u16 port, const struct slot *slot, u32 service)
{
	u64 cookie = get_socket_cookie(ctx);
	struct record *record = slot_of(cookie);
	u64 holder;

	if (!record)
		return;
	holder = *(volatile u64 *)&record->cookie;
	if (holder == cookie) {
		__sync_lock_test_and_set(&record->sequence, opened(record->sequence));
	} else if (unlikely(holder || *(volatile u32 *)&record->spilled ||
			    __sync_val_compare_and_swap(&record->cookie, 0, cookie) != 0)) {
		struct record more = { .cookie = cookie, .sequence = 2 };
		int known = map_lookup(&SOCKETS_MORE, &cookie) != 0;

		if (!known)
			__sync_fetch_and_add(&record->spilled, 1);
		fill(&more, ctx, ip, port, slot, service);
		if (map_update(&SOCKETS_MORE, &cookie, &more, 0)) {
			drop(SOCKETS_FULL);
			if (!known)
				__sync_fetch_and_add(&record->spilled, -1);
		}
		return;
	}
	fill(record, ctx, ip, port, slot, service);
	__sync_lock_test_and_set(&record->sequence, closed(record->sequence));
}

SEC("cgroup/connect4") int c_connect4(struct bpf_sock_addr *ctx)
{
	u32 ip = ctx->user_ip4;
	u16 port = __builtin_bswap16(ctx->user_port);
	struct frontend_key key = { { 0, 0, MAPPED, ip }, port | ctx->protocol << 16 };
	u64 *frontend = map_lookup(&FRONTENDS, &key);
	struct service *entry;
	struct slot *slot;
	u64 word, set;
	u32 service, index;
	u16 len;

	if (!frontend) {
		key.port_proto = 0;
		return map_lookup(&FRONTENDS, &key) ? refuse(0, NO_SUCH_PORT) : ALLOW;
	}
	word = *(volatile u64 *)frontend;
	service = word;
	entry = map_lookup(&SERVICES, &service);
	if (!entry)
		return refuse(service, BAD_SERVICE_INDEX);
	switch ((u8)(word >> 32)) {
	case CLUSTER_IP:
		set = *(volatile u64 *)&entry->internal;
		break;
	case NODE_PORT:
	case EXTERNAL_IP:
	case LOAD_BALANCER:
		set = *(volatile u64 *)&entry->cluster;
		break;
	case ADDRESS:
		return refuse(service, NO_SUCH_PORT);
	default:
		return refuse(service, BAD_KIND);
	}
	len = set >> 32;
	if (!len)
		return refuse(service, set >> 48 & EMPTY_DROPS ? NO_LOCAL_ENDPOINT : NO_ENDPOINT);
	index = (u32)set + (u32)((u64)get_prandom_u32() * len >> 32);
	slot = map_lookup(&BACKEND_SLOTS, &index);
	if (!slot)
		return refuse(service, BAD_SLOT);
	if (slot->addr.high || (u32)slot->addr.low != MAPPED)
		return refuse(service, BAD_FAMILY);
	ctx->user_ip4 = slot->addr.low >> 32;
	ctx->user_port = __builtin_bswap16(slot->port);
	count(service, 1);
	remember(ctx, ip, port, slot, service);
	return ALLOW;
}

SEC("cgroup/getpeername4") int c_getpeername4(struct bpf_sock_addr *ctx)
{
	u64 cookie = get_socket_cookie(ctx);
	struct record *record = slot_of(cookie);
	struct addr peer = mapped(ctx->user_ip4);

	if (!record)
		return ALLOW;
	if (*(volatile u64 *)&record->cookie != cookie) {
		if (!*(volatile u32 *)&record->spilled)
			return ALLOW;
		record = map_lookup(&SOCKETS_MORE, &cookie);
		if (!record)
			return ALLOW;
	}
	if (record->backend_port != __builtin_bswap16(ctx->user_port) || record->backend_addr.low != peer.low ||
	    record->backend_addr.high != peer.high)
		return ALLOW;
	if (record->original_addr.high || (u32)record->original_addr.low != MAPPED)
		return ALLOW;
	ctx->user_ip4 = record->original_addr.low >> 32;
	ctx->user_port = __builtin_bswap16(record->original_port);
	return ALLOW;
}

SEC("cgroup/sock_release") int c_sock_release(void *ctx)
{
	u64 cookie = get_socket_cookie(ctx);
	struct record *record = slot_of(cookie);

	if (!record)
		return ALLOW;
	if (*(volatile u64 *)&record->cookie == cookie) {
		*(volatile u32 *)&record->sequence = opened(record->sequence);
		__sync_lock_test_and_set(&record->cookie, 0);
	} else if (unlikely(*(volatile u32 *)&record->spilled) && map_delete(&SOCKETS_MORE, &cookie) == 0) {
		__sync_fetch_and_add(&record->spilled, -1);
	}
	return ALLOW;
}

SEC("cgroup/connect4") int empty_connect4(struct bpf_sock_addr *ctx)
{
	return ALLOW;
}

SEC("cgroup/getpeername4") int empty_getpeername4(struct bpf_sock_addr *ctx)
{
	return ALLOW;
}

SEC("cgroup/sock_release") int empty_sock_release(void *ctx)
{
	return ALLOW;
}

char LICENSE[] SEC("license") = "Dual MIT/GPL";
