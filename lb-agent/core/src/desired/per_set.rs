//! Values for the three sets of a service port, in little memory.

use std::ops::Index;

/// A value for each set, in the order of [`super::SETS`].
///
/// In most Services the sets are equal. Three equal values take the memory of one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PerSet<T>(Values<T>);

#[derive(Debug, Clone, PartialEq, Eq)]
enum Values<T> {
    Equal(T),
    /// At least two of them differ.
    Different(Box<[T; 3]>),
}

impl<T> PerSet<T> {
    /// Returns the values.
    pub fn iter(&self) -> impl Iterator<Item = &T> + Clone {
        (0..3).map(|i| &self[i])
    }
}

impl<T: Clone + PartialEq> PerSet<T> {
    /// Replaces the value of the set with this position in [`super::SETS`].
    pub(crate) fn set(&mut self, i: usize, value: T) {
        let mut values = [0, 1, 2].map(|i| self[i].clone());
        values[i] = value;
        *self = values.into();
    }
}

impl<T: PartialEq> From<[T; 3]> for PerSet<T> {
    fn from(values: [T; 3]) -> Self {
        if values.iter().all(|value| *value == values[0]) {
            let [first, ..] = values;
            Self(Values::Equal(first))
        } else {
            Self(Values::Different(Box::new(values)))
        }
    }
}

impl<T: Default> Default for PerSet<T> {
    fn default() -> Self {
        Self(Values::Equal(T::default()))
    }
}

impl<T> Index<usize> for PerSet<T> {
    type Output = T;

    fn index(&self, i: usize) -> &T {
        match &self.0 {
            Values::Equal(value) => value,
            Values::Different(values) => &values[i],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_round_trip_and_equal_ones_are_stored_once() {
        let all = |values: &PerSet<u8>| values.iter().copied().collect::<Vec<_>>();
        let mut values = PerSet::from([1, 2, 1]);
        assert_eq!(all(&values), [1, 2, 1]);
        values.set(1, 1);
        assert_eq!((all(&values), values.clone()), (vec![1; 3], PerSet::from([1; 3])));
        assert_eq!(values.0, Values::Equal(1));
        values.set(2, 3);
        assert_eq!((all(&values), values[2]), (vec![1, 1, 3], 3));
        assert_eq!(all(&PerSet::default()), [0; 3]);
    }
}
