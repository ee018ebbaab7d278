//! The calls of bpf(2) that aya 0.14 does not make, and memory-mapped arrays. This is the only unsafe code of the agent,
//! except a call of the C library in `heap`.
#![expect(unsafe_code, reason = "system calls and shared memory")]

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::marker::PhantomData;
use std::mem::{offset_of, zeroed};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd as _, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use aya::maps::{MapData, RingBuf};
use aya_log::EbpfLogger;
use aya_obj::generated::{BPF_F_BEFORE, bpf_attach_type, bpf_attr, bpf_cmd, bpf_link_info, bpf_map_type};
use memmap2::{MmapOptions, MmapRaw};
use tokio::io::unix::AsyncFd;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Calls bpf(2) with an attribute that `fill` makes from zero bytes.
fn bpf(cmd: bpf_cmd, fill: impl FnOnce(&mut bpf_attr)) -> io::Result<libc::c_long> {
    // SAFETY: the kernel's structure is plain data, and all zero bytes is a value of it.
    let mut attr: bpf_attr = unsafe { zeroed() };
    fill(&mut attr);
    bpf_with(cmd, &mut attr)
}

/// Calls bpf(2) with an attribute that the kernel may write to.
fn bpf_with(cmd: bpf_cmd, attr: &mut bpf_attr) -> io::Result<libc::c_long> {
    // SAFETY: the attribute is valid for its size; pointers in it belong to the callers and are valid during the call.
    let result = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            cmd as libc::c_long,
            &raw mut *attr,
            size_of::<bpf_attr>(),
        )
    };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

/// Takes ownership of the descriptor that a call returned.
fn owned(result: libc::c_long) -> OwnedFd {
    // SAFETY: the kernel returned a new descriptor, which has no other owner.
    unsafe { OwnedFd::from_raw_fd(result as i32) }
}

/// An owner of the descriptor of a ring buffer, which stays the same as long as the owner lives.
pub(crate) trait RingBuffer: AsRawFd {}

impl RingBuffer for RingBuf<MapData> {}

impl<T> RingBuffer for EbpfLogger<T> {}

/// Makes a ring buffer that tasks can wait for. The caller must be in the context of a Tokio runtime.
pub(crate) fn watched<T: RingBuffer>(ring: T) -> io::Result<AsyncFd<T>> {
    // SAFETY: the ring owns its map and so its one descriptor, for as long as it lives.
    unsafe { AsyncFd::register(ring) }.map_err(io::Error::from)
}

/// `BPF_OBJ_GET`: opens a pinned object.
pub(crate) fn obj_get(path: &Path) -> io::Result<OwnedFd> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    bpf(bpf_cmd::BPF_OBJ_GET, |attr| {
        attr.__bindgen_anon_4.pathname = path.as_ptr() as u64;
    })
    .map(owned)
}

/// `BPF_OBJ_PIN`: keeps an object alive under a path.
pub(crate) fn obj_pin(object: BorrowedFd<'_>, path: &Path) -> io::Result<()> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    bpf(bpf_cmd::BPF_OBJ_PIN, |attr| {
        attr.__bindgen_anon_4.pathname = path.as_ptr() as u64;
        attr.__bindgen_anon_4.bpf_fd = object.as_raw_fd() as u32;
    })
    .map(drop)
}

/// `BPF_LINK_CREATE`: attaches a program to a cgroup, in addition to those that are attached.
pub(crate) fn link_create(
    program: BorrowedFd<'_>,
    cgroup: BorrowedFd<'_>,
    attach_type: bpf_attach_type,
) -> io::Result<OwnedFd> {
    bpf(bpf_cmd::BPF_LINK_CREATE, |attr| {
        attr.link_create.__bindgen_anon_1.prog_fd = program.as_raw_fd() as u32;
        attr.link_create.__bindgen_anon_2.target_fd = cgroup.as_raw_fd() as u32;
        attr.link_create.attach_type = attach_type as u32;
    })
    .map(owned)
}

/// `BPF_LINK_CREATE`: attaches a program to one side of a device (`BPF_TCX_INGRESS`, `BPF_TCX_EGRESS`), before all
/// other programs. The device belongs to the network namespace of the calling thread; zero is no device.
pub(crate) fn tcx_create(program: BorrowedFd<'_>, device: u32, attach_type: bpf_attach_type) -> io::Result<OwnedFd> {
    bpf(bpf_cmd::BPF_LINK_CREATE, |attr| {
        attr.link_create.__bindgen_anon_1.prog_fd = program.as_raw_fd() as u32;
        attr.link_create.__bindgen_anon_2.target_ifindex = device;
        attr.link_create.attach_type = attach_type as u32;
        attr.link_create.flags = BPF_F_BEFORE;
    })
    .map(owned)
}

/// `BPF_LINK_UPDATE`: replaces the program of a link atomically.
pub(crate) fn link_update(link: BorrowedFd<'_>, program: BorrowedFd<'_>) -> io::Result<()> {
    bpf(bpf_cmd::BPF_LINK_UPDATE, |attr| {
        attr.link_update.link_fd = link.as_raw_fd() as u32;
        attr.link_update.__bindgen_anon_1.new_prog_fd = program.as_raw_fd() as u32;
    })
    .map(drop)
}

/// `BPF_LINK_DETACH`: the program is detached when this returns, and the link is of no further use.
pub(crate) fn link_detach(link: BorrowedFd<'_>) -> io::Result<()> {
    bpf(bpf_cmd::BPF_LINK_DETACH, |attr| {
        attr.link_detach.link_fd = link.as_raw_fd() as u32;
    })
    .map(drop)
}

/// `BPF_MAP_LOOKUP_AND_DELETE_ELEM` of a hash: removes an entry and reads its value in one step. Returns false if the key
/// does not exist.
pub(crate) fn lookup_and_delete(map: BorrowedFd<'_>, key: &[u8], value: &mut [u8]) -> io::Result<bool> {
    let result = bpf(bpf_cmd::BPF_MAP_LOOKUP_AND_DELETE_ELEM, |attr| {
        attr.__bindgen_anon_2.map_fd = map.as_raw_fd() as u32;
        attr.__bindgen_anon_2.key = key.as_ptr() as u64;
        attr.__bindgen_anon_2.__bindgen_anon_1.value = value.as_mut_ptr() as u64;
    });
    match result {
        Ok(_) => Ok(true),
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(false),
        Err(error) => Err(error),
    }
}

/// The result of [`lookup_batch`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Batch {
    /// Number of keys and values that were read.
    pub(crate) count: usize,
    /// Bucket that the next batch begins with; `None` at the end.
    pub(crate) next: Option<u32>,
}

/// `BPF_MAP_LOOKUP_BATCH` of a hash: reads whole buckets, as many as fit, from a bucket on. `sizes`: those of a key and a value of
/// the map, in bytes. All batches together contain an entry that exists all the time exactly once.
///
/// # Errors
/// ENOSPC if a bucket has more entries than there is room for; otherwise the error of the system call.
pub(crate) fn lookup_batch(
    map: BorrowedFd<'_>,
    sizes: [usize; 2],
    from: Option<u32>,
    keys: &mut [u8],
    values: &mut [u8],
) -> io::Result<Batch> {
    let [key, value] = sizes;
    let mut next = 0_u32;
    // SAFETY: the kernel's structure is plain data, and all zero bytes is a value of it.
    let mut attr: bpf_attr = unsafe { zeroed() };
    attr.batch.map_fd = map.as_raw_fd() as u32;
    attr.batch.in_batch = from.as_ref().map_or(0, |from| (&raw const *from) as u64);
    attr.batch.out_batch = (&raw mut next) as u64;
    attr.batch.keys = keys.as_mut_ptr() as u64;
    attr.batch.values = values.as_mut_ptr() as u64;
    attr.batch.count = (keys.len() / key).min(values.len() / value) as u32;
    let result = bpf_with(bpf_cmd::BPF_MAP_LOOKUP_BATCH, &mut attr);
    // SAFETY: the kernel has written the number of entries; any bytes are a value.
    let count = unsafe { attr.batch.count } as usize;
    match result {
        Ok(_) => Ok(Batch {
            count,
            next: Some(next),
        }),
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(Batch { count, next: None }),
        Err(error) => Err(error),
    }
}

/// The attachment of a link of a cgroup program.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct CgroupLink {
    /// Id (inode) of the cgroup; zero if it was removed.
    pub(crate) cgroup: u64,
    /// Id of the program.
    pub(crate) program: u32,
}

/// `BPF_OBJ_GET_INFO_BY_FD` of a link.
fn link_info(link: BorrowedFd<'_>) -> io::Result<bpf_link_info> {
    // SAFETY: the kernel's structure is plain data, and all zero bytes is a value of it.
    let mut info: bpf_link_info = unsafe { zeroed() };
    bpf(bpf_cmd::BPF_OBJ_GET_INFO_BY_FD, |attr| {
        attr.info.bpf_fd = link.as_raw_fd() as u32;
        attr.info.info_len = size_of::<bpf_link_info>() as u32;
        attr.info.info = (&raw mut info) as u64;
    })?;
    Ok(info)
}

/// `BPF_OBJ_GET_INFO_BY_FD` of a link of a cgroup program.
pub(crate) fn cgroup_link(link: BorrowedFd<'_>) -> io::Result<CgroupLink> {
    let info = link_info(link)?;
    Ok(CgroupLink {
        // SAFETY: for a cgroup link the kernel fills this field of the union; any bytes are a value.
        cgroup: unsafe { info.__bindgen_anon_1.cgroup.cgroup_id },
        program: info.prog_id,
    })
}

/// The attachment of a tcx link.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct TcxLink {
    /// Index of the device; zero if it was removed.
    pub(crate) device: u32,
    /// Id of the program.
    pub(crate) program: u32,
}

/// `BPF_OBJ_GET_INFO_BY_FD` of a tcx link.
pub(crate) fn tcx_link(link: BorrowedFd<'_>) -> io::Result<TcxLink> {
    let info = link_info(link)?;
    Ok(TcxLink {
        // SAFETY: for a tcx link the kernel fills this field of the union; any bytes are a value.
        device: unsafe { info.__bindgen_anon_1.tcx.ifindex },
        program: info.prog_id,
    })
}

/// A private array of maps whose update makes the kernel wait for every running program
/// (`maybe_wait_bpf_programs` in `kernel/bpf/syscall.c`: `synchronize_rcu` after an update of a map in map).
#[derive(Debug)]
pub(crate) struct GraceMap {
    outer: OwnedFd,
    inner: OwnedFd,
}

impl GraceMap {
    pub(crate) fn new() -> io::Result<Self> {
        let inner = create(bpf_map_type::BPF_MAP_TYPE_ARRAY, 0)?;
        let outer = create(bpf_map_type::BPF_MAP_TYPE_ARRAY_OF_MAPS, inner.as_raw_fd() as u32)?;
        Ok(Self { outer, inner })
    }

    /// Returns after all programs that ran when it was called have ended.
    pub(crate) fn synchronize(&self) -> io::Result<()> {
        let key = 0_u32;
        let value = self.inner.as_raw_fd();
        bpf(bpf_cmd::BPF_MAP_UPDATE_ELEM, |attr| {
            attr.__bindgen_anon_2.map_fd = self.outer.as_raw_fd() as u32;
            attr.__bindgen_anon_2.key = (&raw const key) as u64;
            attr.__bindgen_anon_2.__bindgen_anon_1.value = (&raw const value) as u64;
        })
        .map(drop)
    }
}

/// `BPF_MAP_CREATE` of an array of one `u32`.
fn create(map_type: bpf_map_type, inner: u32) -> io::Result<OwnedFd> {
    bpf(bpf_cmd::BPF_MAP_CREATE, |attr| {
        // SAFETY: all fields are plain integers.
        let create = unsafe { &mut attr.__bindgen_anon_1 };
        create.map_type = map_type as u32;
        create.key_size = 4;
        create.value_size = 4;
        create.max_entries = 1;
        create.inner_map_fd = inner;
    })
    .map(owned)
}

/// Returns the cookie of the calling thread's network namespace (`SO_NETNS_COOKIE`), as `bpf_get_netns_cookie` does.
pub(crate) fn netns_cookie() -> io::Result<u64> {
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};
    // The socket is not bound, since a program could refuse that.
    let socket = socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?;
    let mut cookie = 0_u64;
    let mut len = size_of::<u64>() as libc::socklen_t;
    // SAFETY: value and length are valid for writes of the given length.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_NETNS_COOKIE,
            (&raw mut cookie).cast(),
            &raw mut len,
        )
    };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(cookie)
    }
}

/// `BPF_MAP_LOOKUP_ELEM` of a per-CPU array: reads the values of all CPUs into `values`, which must have room for them. Each
/// begins at a multiple of 8 bytes.
pub(crate) fn lookup_per_cpu(map: BorrowedFd<'_>, index: u32, values: &mut [u8]) -> io::Result<()> {
    bpf(bpf_cmd::BPF_MAP_LOOKUP_ELEM, |attr| {
        attr.__bindgen_anon_2.map_fd = map.as_raw_fd() as u32;
        attr.__bindgen_anon_2.key = (&raw const index) as u64;
        attr.__bindgen_anon_2.__bindgen_anon_1.value = values.as_mut_ptr() as u64;
    })
    .map(drop)
}

/// A memory-mapped `BPF_MAP_TYPE_ARRAY` (`BPF_F_MMAPABLE`) of values whose size and alignment are multiples of 8.
///
/// The values of another layout may have fewer bytes than `T`, which are read as zero and not written, or more, which are ignored.
///
/// Programs and other processes read and write the same memory, so every access is a volatile one of 8 aligned bytes
/// (or of a field), and there are no references into the memory. Stores become visible in the order in which they are
/// made.
pub(crate) struct MappedArray<T> {
    memory: MmapRaw,
    len: u32,
    /// Number of words between two values.
    stride: usize,
    value: PhantomData<T>,
}

impl<T: FromBytes + IntoBytes + Immutable + KnownLayout + Copy> MappedArray<T> {
    const WORDS: usize = {
        assert!(size_of::<T>().is_multiple_of(8) && align_of::<T>() == 8);
        size_of::<T>() / 8
    };

    /// Maps an array of `len` values of `value_size` bytes.
    pub(crate) fn new(map: BorrowedFd<'_>, len: u32, value_size: u32) -> io::Result<Self> {
        let file = File::from(map.try_clone_to_owned()?);
        let stride = value_size.div_ceil(8) as usize;
        let memory = MmapOptions::new().len(stride * 8 * len as usize).map_raw(&file)?;
        Ok(Self {
            memory,
            len,
            stride,
            value: PhantomData,
        })
    }

    pub(crate) fn len(&self) -> u32 {
        self.len
    }

    /// Returns the address of a word of a value, if both are in range.
    fn word(&self, index: u32, word: usize) -> Option<*mut u64> {
        if index >= self.len || word >= self.stride {
            return None;
        }
        let at = self.memory.as_mut_ptr().cast::<u64>();
        // SAFETY: the index and the word are in range, and the mapping is aligned to pages.
        Some(unsafe { at.add(index as usize * self.stride + word) })
    }

    /// Reads one word of a value.
    pub(crate) fn read_word(&self, index: u32, word: usize) -> Option<u64> {
        let at = self.word(index, word)?;
        // SAFETY: a valid, aligned address in the mapping.
        Some(unsafe { at.read_volatile() })
    }

    /// Reads a value word by word. Each word is consistent; the value as a whole is so only if nothing writes to it.
    pub(crate) fn read(&self, index: u32) -> Option<T> {
        let mut value = T::new_zeroed();
        for (i, bytes) in value.as_mut_bytes().chunks_exact_mut(8).take(self.stride).enumerate() {
            // SAFETY: a valid, aligned address in the mapping.
            let word = unsafe { self.word(index, i)?.read_volatile() };
            bytes.copy_from_slice(&word.to_ne_bytes());
        }
        Some(value)
    }

    /// Stores the words of `value` in `words`, in that order, each by one 8-byte store. Returns false if one is out of
    /// range.
    pub(crate) fn write_words(&self, index: u32, value: &T, words: impl IntoIterator<Item = usize>) -> bool {
        let bytes = value.as_bytes();
        for i in words {
            let (Some(at), Some(word)) = (self.word(index, i), bytes.get(i * 8..i * 8 + 8)) else {
                return false;
            };
            let word = u64::from_ne_bytes(word.try_into().unwrap_or_default());
            // All stores before this one, here or in another array, are visible to every CPU before it is.
            std::sync::atomic::fence(Ordering::Release);
            // SAFETY: a valid, aligned address in the mapping.
            unsafe { at.write_volatile(word) };
        }
        true
    }

    /// Changes a word of a value from `old` to `new` by one atomic exchange. Returns false if it is not `old`, or out of
    /// range.
    pub(crate) fn compare_exchange(&self, index: u32, word: usize, old: u64, new: u64) -> bool {
        let Some(at) = self.word(index, word) else {
            return false;
        };
        // SAFETY: a valid, aligned address in the mapping, which programs change by atomic operations too.
        let word = unsafe { AtomicU64::from_ptr(at) };
        word.compare_exchange(old, new, Ordering::SeqCst, Ordering::SeqCst)
            .is_ok()
    }

    /// Changes the u32 at a byte offset (a multiple of 4) of a value by an atomic operation, and returns the old
    /// number. Returns `None` if the index is out of range, or if `change` returns `None`.
    pub(crate) fn update_u32(&self, index: u32, offset: usize, change: impl Fn(u32) -> Option<u32>) -> Option<u32> {
        let at = self.word(index, word_of(offset))?.cast::<u32>();
        // SAFETY: a valid, aligned address in the mapping; a word has two fields of 4 bytes.
        let field = unsafe { AtomicU32::from_ptr(at.add(offset % 8 / 4)) };
        field.fetch_update(Ordering::SeqCst, Ordering::SeqCst, change).ok()
    }

    /// Stores all of `value`, first word first.
    pub(crate) fn write(&self, index: u32, value: &T) -> bool {
        self.write_words(index, value, 0..Self::WORDS.min(self.stride))
    }
}

/// Returns the number of the word that the field at a byte offset is in.
pub(crate) const fn word_of(offset: usize) -> usize {
    offset / 8
}

/// The layout that writers of single words rely on.
const _: () = {
    use lb_common::abi::{Backend, Service};
    assert!(offset_of!(Service, cluster) == 16);
    assert!(word_of(offset_of!(Backend, generation)) == word_of(offset_of!(Backend, seal)));
    assert!(word_of(offset_of!(Backend, port)) == word_of(offset_of!(Backend, flags)));
    assert!(word_of(offset_of!(Backend, port)) == word_of(offset_of!(Backend, service)));
};
