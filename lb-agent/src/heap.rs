//! Memory that was freed, back to the kernel.
#![expect(unsafe_code, reason = "a call of the C library")]

/// Gives back what is free, also between what is in use. Takes some milliseconds per 100 MB.
///
/// The C library does so by itself only for the end of the heap, so what was needed for a moment, such as all texts of a
/// large manifest, would stay for good.
pub(crate) fn give_back() {
    #[cfg(target_env = "gnu")]
    // SAFETY: may be called at any time, from any thread.
    unsafe {
        libc::malloc_trim(0);
    }
}
