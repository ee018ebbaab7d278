// Types, maps and steps that the C programs share. See sockets.bpf.c and packets.bpf.c.
//
// Layouts are those of lb-common/src/abi. It includes no header: the necessary parts of the kernel's (linux/bpf.h) are here.

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
#define READ_ONCE(x) (*(const volatile typeof(x) *)&(x))
#define WRITE_ONCE(x, value) (*(volatile typeof(x) *)&(x) = (value))

enum { MAP_HASH = 1, MAP_ARRAY, MAP_PROG_ARRAY, MAP_PERCPU_ARRAY = 6, MAP_LRU_HASH = 9, MAP_LPM_TRIE = 11 };
enum { NO_PREALLOC = 1 << 0, MMAPABLE = 1 << 10 };
enum { ANY = 0, NOEXIST = 1 };

static void *(*map_lookup)(void *map, const void *key) = (void *)1;
static long (*map_update)(void *map, const void *key, const void *value, u64 flags) = (void *)2;
static long (*map_delete)(void *map, const void *key) = (void *)3;
static u32 (*get_prandom_u32)(void) = (void *)7;
static u64 (*ktime_get_coarse_ns)(void) = (void *)160;

// An IPv6 address, or an IPv4 address in its v4-mapped form.
struct addr {
	u64 high, low;
};

// Key of FRONTENDS. The last word has the port, and the protocol above it. A key of an address alone is its prefix.
struct frontend_key {
	u32 addr[4];
	u32 port_proto;
};

struct frontend {
	u64 service_kind; // Service index, with the kind above it.
	u64 set;
};

struct service {
	u64 internal, external, cluster;
	u32 flags, affinity_timeout, generation, pad;
	u64 reserved[3];
};

struct slot {
	struct addr addr;
	u16 port, flags;
	u32 backend, generation, service;
};

struct backend {
	struct addr addr;
	u16 port, flags;
	u32 service, generation, seal;
};

struct affinity_key {
	struct addr who;
	u32 service, kind;
};

struct affinity {
	u64 backend; // Backend id, with the generation in the upper half.
	u64 used;
};

struct stats {
	u64 connections, refused, reserved[2];
};

struct config {
	u32 events;
	u16 snat_first, snat_last;
	u64 reserved[7];
};

// The pinned maps determine the sizes.
struct {
	__uint(type, MAP_HASH);
	__uint(max_entries, 1);
	__type(key, struct frontend_key);
	__type(value, struct frontend);
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
	__type(value, struct backend);
} BACKENDS SEC(".maps");

struct {
	__uint(type, MAP_HASH);
	__uint(max_entries, 1);
	__type(key, struct addr);
	__type(value, u32);
} NODE_ADDRS SEC(".maps");

struct {
	__uint(type, MAP_LRU_HASH);
	__uint(max_entries, 1);
	__type(key, struct affinity_key);
	__type(value, struct affinity);
} AFFINITY SEC(".maps");

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

struct {
	__uint(type, MAP_ARRAY);
	__uint(max_entries, 1);
	__uint(map_flags, MMAPABLE);
	__type(key, u32);
	__type(value, struct config);
} CONFIG SEC(".maps");

enum {
	NO_ENDPOINT,
	NO_LOCAL_ENDPOINT,
	NO_SUCH_PORT,
	BAD_SERVICE_INDEX,
	BAD_SLOT,
	BAD_FAMILY,
	BAD_KIND,
	SOCKETS_FULL,
	EVENT_LOST,
	UDP_SOCKETS_FULL,
	UDP_FLOWS_FULL,
	UDP_FLOW_REPLACED,
	NODE_PORT_TAKEN,
	CONNTRACK_FULL,
	SNAT_PORTS_EXHAUSTED,
	SOURCE_NOT_ALLOWED,
	NO_ROUTE,
	NO_SOURCE_ADDRESS,
	TOO_BIG,
	TTL_EXCEEDED,
	BACKEND_GONE,
	UNTRANSLATED,
	REWRITE_FAILED,
	MALFORMED,
	FRAGMENT,
	HEADER_OPTIONS,
	OTHER_PROTOCOL,
	ICMP_ERROR,
	VLAN,
};
enum { SERVED = -1, PASSED = -2 };
enum { ADDRESS = 1, CLUSTER_IP, NODE_PORT, EXTERNAL_IP, LOAD_BALANCER };
enum { EMPTY_DROPS = 1 };
enum { HAS_AFFINITY = 1, HAS_SOURCE_RANGES = 2 };
enum { IN_INTERNAL = 1, IN_EXTERNAL = 2, IN_CLUSTER = 4, LOCAL = 8 };
enum { CLIENT_ADDRESS, CLIENT_NETNS };
enum { CONNECTED = 1, SENT, REFUSED, DESTROYED, TRANSLATED, REJECTED };

#define SECOND 1000000000ull
#define MAPPED __builtin_bswap32(0xffff)

static inline struct addr mapped(u32 v4)
{
	return (struct addr){ 0, (u64)v4 << 32 | MAPPED };
}

static inline int is_v4(struct addr addr)
{
	return !addr.high && (u32)addr.low == MAPPED;
}

static inline int is_same(struct addr a, struct addr b)
{
	return !((a.high ^ b.high) | (a.low ^ b.low));
}

// Returns the loopback address for address zero, because the kernel sends packets to address zero there.
static inline struct addr or_loopback(struct addr to)
{
	if (unlikely(is_same(to, mapped(0))))
		return mapped(__builtin_bswap32(0x7f000001));
	if (unlikely(is_same(to, (struct addr){ 0, 0 })))
		return (struct addr){ 0, 1ull << 56 };
	return to;
}

static inline int is_loopback(struct addr to)
{
	return is_v4(to) ? (to.low >> 32 & 0xff) == 127 : is_same(to, (struct addr){ 0, 1ull << 56 });
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

static inline void event(u32 kind)
{
	u32 zero = 0;
	struct config *config = map_lookup(&CONFIG, &zero);

	if (config && unlikely(READ_ONCE(config->events) >> kind & 1))
		drop(EVENT_LOST);
}

// The service port and set that serve a destination.
struct serving {
	u32 service, flags;
	u16 member;
	struct service *entry;
	u64 *set;
};

// The selected backend.
struct choice {
	struct addr addr;
	u16 port, flags;
	u32 backend, generation;
};

// Returns the remembered backend if it may be reused.
static inline int again(const struct serving *serving, u32 index, u32 generation, struct choice *choice)
{
	struct backend *backend = map_lookup(&BACKENDS, &index);
	u16 flags;

	if (!backend || READ_ONCE(backend->generation) != generation || !(generation & 1) ||
	    READ_ONCE(backend->service) != serving->service)
		return 0;
	flags = READ_ONCE(backend->flags);
	if (!(flags & serving->member))
		return 0;
	*choice = (struct choice){ backend->addr, backend->port, flags, index, generation };
	return 1;
}

static inline int any(const struct serving *serving, struct choice *choice)
{
	u64 set = READ_ONCE(*serving->set);
	u16 len = set >> 32;
	struct slot *slot;
	u32 index;

	if (unlikely(!len))
		return set >> 48 & EMPTY_DROPS ? NO_LOCAL_ENDPOINT : NO_ENDPOINT;
	index = (u32)set + (u32)((u64)get_prandom_u32() * len >> 32);
	slot = map_lookup(&BACKEND_SLOTS, &index);
	if (!slot)
		return BAD_SLOT;
	*choice = (struct choice){ slot->addr, slot->port, slot->flags, slot->backend, slot->generation };
	return SERVED;
}

static inline int choose_by_affinity(const struct serving *serving, struct addr who, u32 kind, struct choice *choice)
{
	u64 now = ktime_get_coarse_ns();
	u64 patience = READ_ONCE(serving->entry->affinity_timeout) * SECOND;
	struct affinity_key key = { who, serving->service, kind };
	struct affinity *known = map_lookup(&AFFINITY, &key);
	struct affinity new = { 0, now };
	u64 seen = 0;
	int result;

	if (known) {
		u64 used = READ_ONCE(known->used);
		u64 age = now > used ? now - used : 0;

		seen = READ_ONCE(known->backend);
		if (age < patience && again(serving, seen, seen >> 32, choice)) {
			if (age >= SECOND)
				WRITE_ONCE(known->used, now);
			return SERVED;
		}
	}
	result = any(serving, choice);
	if (result != SERVED)
		return result;
	new.backend = choice->backend | (u64)choice->generation << 32;
	if (known) {
		if (__sync_bool_compare_and_swap(&known->backend, seen, new.backend)) {
			WRITE_ONCE(known->used, now);
			return SERVED;
		}
	} else {
		if (!map_update(&AFFINITY, &key, &new, NOEXIST))
			return SERVED;
		known = map_lookup(&AFFINITY, &key);
		if (!known)
			return SERVED;
	}
	// Another connection of the client has inserted the entry first.
	seen = READ_ONCE(known->backend);
	again(serving, seen, seen >> 32, choice);
	return SERVED;
}
