//! Values that many objects have in common, stored once: names of nodes, namespaces and ports.
//!
//! A cluster of 30,000 Services has 300,000 endpoints on a few hundred nodes. The tables are those of the process, since
//! objects come from several sources and are parsed in several threads.

use std::borrow::Borrow;
use std::collections::HashSet;
use std::hash::Hash;
use std::sync::{Arc, LazyLock, Mutex, PoisonError};

/// Returns the one copy of a text that all users in the process share.
#[must_use]
pub fn text(text: &str) -> Arc<str> {
    static TEXTS: LazyLock<Mutex<Table<str>>> = LazyLock::new(Mutex::default);
    TEXTS.lock().unwrap_or_else(PoisonError::into_inner).share(text)
}

/// A set of shared values, without duplicates.
pub(crate) struct Table<T: ?Sized> {
    values: HashSet<Arc<T>>,
    /// The number of values at which the table drops those that it alone holds.
    full: usize,
}

impl<T: ?Sized> Default for Table<T> {
    fn default() -> Self {
        Self {
            values: HashSet::new(),
            full: 1024,
        }
    }
}

impl<T: ?Sized + Eq + Hash> Table<T> {
    /// Returns the copy of a value that the table has, or adds it.
    pub(crate) fn share<V: Borrow<T>>(&mut self, value: V) -> Arc<T>
    where
        Arc<T>: From<V>,
    {
        if let Some(known) = self.values.get(value.borrow()) {
            return Arc::clone(known);
        }
        if self.values.len() >= self.full {
            self.values.retain(|value| Arc::strong_count(value) > 1);
            self.full = (2 * self.values.len()).max(1024);
        }
        let new = Arc::from(value);
        self.values.insert(Arc::clone(&new));
        new
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_texts_are_one() {
        assert!(Arc::ptr_eq(&text("node-1"), &text("node-1")));
        assert!(!Arc::ptr_eq(&text("node-1"), &text("node-2")));
    }

    #[test]
    fn unused_values_are_dropped_and_used_ones_stay() {
        let mut table = Table::<str>::default();
        let held = table.share("held");
        for i in 0..10_000 {
            let _ = table.share(&*format!("passing {i}"));
        }
        assert!(table.values.len() <= 1024, "{}", table.values.len());
        assert!(Arc::ptr_eq(&held, &table.share("held")));
    }
}
