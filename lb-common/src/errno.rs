//! Error numbers of Linux that the programs return or compare with (`include/uapi/asm-generic/errno-base.h` and `errno.h`).
//! Positive, as in C.

/// An error number with its name in C.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Errno {
    /// The positive number.
    pub number: i32,
    /// The name of the macro in C.
    pub name: &'static str,
}

macro_rules! errnos {
    ($($(#[$doc:meta])* $name:ident = $number:literal;)*) => {
        $($(#[$doc])* pub const $name: Errno = Errno { number: $number, name: stringify!($name) };)*
    };
}

errnos! {
    /// Cannot allocate memory.
    ENOMEM = 12;
    /// The file, or the key of a map, exists.
    EEXIST = 17;
    /// The address is already in use.
    EADDRINUSE = 98;
    /// The connection was refused.
    ECONNREFUSED = 111;
    /// No route to the host.
    EHOSTUNREACH = 113;
}
