//! The heap of the C library.
#![expect(unsafe_code, reason = "a call of the C library")]

/// Returns freed heap memory to the kernel (`malloc_trim`), also from between blocks that are in use. It takes some
/// milliseconds per 100 MB.
///
/// By itself the C library returns only the free end of the heap, so memory that is needed for a moment, such as all
/// texts of a large manifest, would stay with the process for good.
pub fn trim() {
    #[cfg(target_env = "gnu")]
    // SAFETY: `malloc_trim` has no preconditions and is thread-safe: it takes the locks of the allocator itself.
    unsafe {
        libc::malloc_trim(0);
    }
}
