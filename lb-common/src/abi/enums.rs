//! The macro that defines the enums that cross the kernel boundary.

/// Defines an enum with numbers that are stored in map values. Each row is a value with its number and its label.
///
/// A new value is one row. Every `match` over the enum is exhaustive, so the compiler names the places that a new value
/// concerns.
macro_rules! abi_enum {
    (
        $(#[$meta:meta])*
        pub enum $name:ident: $repr:ident, $from:ident {
            $($(#[$doc:meta])* $value:ident = $number:literal, $label:literal;)*
        }
    ) => {
        $(#[$meta])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[repr($repr)]
        pub enum $name {
            $($(#[$doc])* $value = $number,)*
        }

        impl $name {
            /// All values, in the order of their numbers.
            pub const ALL: &[Self] = &[$(Self::$value),*];

            /// Returns the value with a number, if there is one.
            #[inline(always)]
            #[must_use]
            pub const fn $from(number: $repr) -> Option<Self> {
                match number {
                    $($number => Some(Self::$value),)*
                    _ => None,
                }
            }

            /// Returns the name that tables and JSON show.
            #[must_use]
            pub const fn label(self) -> &'static str {
                match self {
                    $(Self::$value => $label,)*
                }
            }
        }
    };
}

pub(crate) use abi_enum;
