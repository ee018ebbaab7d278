//! Descriptions of the ABI types: size, alignment, and the offset of every field.
//!
//! The golden file `lb-common/tests/layout.golden` lists them, so that a change of a layout without a new
//! [`super::VERSION`] fails a test.

use core::fmt;

/// Size, alignment and fields of a type.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TypeLayout {
    /// Size in bytes.
    pub size: usize,
    /// Alignment in bytes.
    pub align: usize,
    /// Name, and the parts that the type consists of.
    pub shape: Shape,
}

/// The parts that a type consists of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shape {
    /// An integer, or nothing.
    Scalar(&'static str),
    /// An array of elements of one type.
    Array(&'static TypeLayout, usize),
    /// A structure: its name and its fields in the order of their offsets.
    Struct(&'static str, &'static [FieldLayout]),
}

/// A field of a structure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FieldLayout {
    /// Name of the field.
    pub name: &'static str,
    /// Offset from the start of the structure, in bytes.
    pub offset: usize,
    /// Layout of the field's type.
    pub layout: &'static TypeLayout,
}

impl fmt::Display for TypeLayout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.shape {
            Shape::Scalar(name) | Shape::Struct(name, _) => f.write_str(name),
            Shape::Array(element, len) => write!(f, "[{element}; {len}]"),
        }
    }
}

/// A type that crosses the kernel boundary.
pub trait AbiType {
    /// Layout of the type.
    const LAYOUT: &'static TypeLayout;
}

/// Returns the layout of the field that a function borrows.
#[must_use]
pub const fn layout_of_field<T, F: AbiType>(_field: fn(&T) -> &F) -> &'static TypeLayout {
    F::LAYOUT
}

/// Returns the size in bytes of the field that a function borrows.
#[must_use]
pub const fn size_of_field<T, F>(_field: fn(&T) -> &F) -> usize {
    size_of::<F>()
}

macro_rules! scalars {
    ($($type:ty),*) => {
        $(impl AbiType for $type {
            const LAYOUT: &'static TypeLayout = &TypeLayout {
                size: size_of::<$type>(),
                align: align_of::<$type>(),
                shape: Shape::Scalar(stringify!($type)),
            };
        })*
    };
}

scalars!((), u8, u16, u32, u64);

impl<T: AbiType, const N: usize> AbiType for [T; N] {
    const LAYOUT: &'static TypeLayout = &TypeLayout {
        size: size_of::<Self>(),
        align: align_of::<Self>(),
        shape: Shape::Array(T::LAYOUT, N),
    };
}

/// Asserts size, alignment and the offset of every field of a structure at compile time, and implements [`AbiType`].
///
/// A field that is not listed does not compile.
macro_rules! layout {
    ($type:ident: size $size:literal, align $align:literal { $($field:ident: $offset:literal),* $(,)? }) => {
        const _: () = {
            assert!(size_of::<$type>() == $size && align_of::<$type>() == $align);
            $(assert!(core::mem::offset_of!($type, $field) == $offset);)*
            const fn every_field_is_listed(value: $type) {
                let $type { $($field: _),* } = value;
            }
            let _: fn($type) = every_field_is_listed;
        };

        impl $crate::abi::layout::AbiType for $type {
            const LAYOUT: &'static $crate::abi::layout::TypeLayout = &$crate::abi::layout::TypeLayout {
                size: size_of::<$type>(),
                align: align_of::<$type>(),
                shape: $crate::abi::layout::Shape::Struct(
                    stringify!($type),
                    &[$($crate::abi::layout::FieldLayout {
                        name: stringify!($field),
                        offset: core::mem::offset_of!($type, $field),
                        layout: $crate::abi::layout::layout_of_field(|value: &$type| &value.$field),
                    }),*],
                ),
            };
        }
    };
}

/// Asserts at compile time that a structure of words has the bytes of an ABI type: every word field begins where the
/// first of its listed fields begins, and is as long as all of them together.
///
/// A field of either type that is not listed does not compile.
macro_rules! mirror {
    ($words:ident of $type:ident { $($word:ident: $first:ident $(+ $more:ident)*),* $(,)? }) => {
        const _: () = {
            use $crate::abi::layout::size_of_field;
            assert!(size_of::<$words>() == size_of::<$type>());
            assert!(align_of::<$words>() >= align_of::<$type>());
            $(
                assert!(core::mem::offset_of!($words, $word) == core::mem::offset_of!($type, $first));
                assert!(
                    size_of_field(|words: &$words| &words.$word)
                        == size_of_field(|value: &$type| &value.$first)
                            $(+ size_of_field(|value: &$type| &value.$more))*
                );
            )*
            const fn every_field_is_listed(words: $words, value: $type) {
                let $words { $($word: _),* } = words;
                let $type { $($first: _, $($more: _,)*)* } = value;
            }
            let _: fn($words, $type) = every_field_is_listed;
        };
    };
}

pub(super) use {layout, mirror};
