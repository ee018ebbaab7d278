//! Coordinates the threads that use the pinned maps with moves: a move excludes them, and afterwards they open the new maps.

use std::ops::{Deref, DerefMut};
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use lb_core::maps::MapError;

/// The number of moves so far. A thread that uses the maps holds the lock for reading, and a move for writing.
#[derive(Debug, Clone, Default)]
pub struct MapGate(Arc<RwLock<u64>>);

impl MapGate {
    /// Waits until no thread uses the maps, and excludes them until the returned value is dropped.
    pub(crate) fn close(&self) -> ClosedGate<'_> {
        ClosedGate(self.0.write().unwrap_or_else(PoisonError::into_inner))
    }
}

/// Excludes the other threads from the maps.
pub(crate) struct ClosedGate<'a>(RwLockWriteGuard<'a, u64>);

impl ClosedGate<'_> {
    /// Makes the other threads open the maps again.
    pub(crate) fn maps_were_replaced(&mut self) {
        *self.0 += 1;
    }
}

/// Maps that a thread opens by path.
#[derive(Debug)]
pub(crate) struct SharedMaps<T> {
    gate: MapGate,
    dir: PathBuf,
    open: fn(&Path) -> Result<T, MapError>,
    /// The number of moves when the maps were opened.
    moves: u64,
    maps: T,
}

impl<T> SharedMaps<T> {
    /// Opens the maps that are pinned in a directory.
    ///
    /// # Errors
    /// Returns the error of `open`.
    pub(crate) fn open(gate: &MapGate, dir: &Path, open: fn(&Path) -> Result<T, MapError>) -> Result<Self, MapError> {
        let moves = *gate.0.read().unwrap_or_else(PoisonError::into_inner);
        Ok(Self {
            gate: gate.clone(),
            dir: dir.to_owned(),
            open,
            moves,
            maps: open(dir)?,
        })
    }

    /// Returns the maps, and whether they were opened again because of a move. Moves wait until the returned maps are
    /// dropped.
    ///
    /// # Errors
    /// Returns the error of `open`.
    pub(crate) fn enter(&mut self) -> Result<(Entered<'_, T>, bool), MapError> {
        let guard = self.gate.0.read().unwrap_or_else(PoisonError::into_inner);
        let is_new = *guard != self.moves;
        if is_new {
            self.maps = (self.open)(&self.dir)?;
            self.moves = *guard;
        }
        let entered = Entered {
            _guard: guard,
            maps: &mut self.maps,
        };
        Ok((entered, is_new))
    }
}

/// Maps that no move replaces as long as this exists.
pub(crate) struct Entered<'a, T> {
    _guard: RwLockReadGuard<'a, u64>,
    maps: &'a mut T,
}

impl<T> Deref for Entered<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        self.maps
    }
}

impl<T> DerefMut for Entered<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        self.maps
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;

    #[test]
    fn maps_are_opened_again_after_a_move_only() {
        static OPENED: AtomicU32 = AtomicU32::new(0);
        let gate = MapGate::default();
        let open = |_: &Path| Ok(OPENED.fetch_add(1, Ordering::Relaxed));
        let mut maps = SharedMaps::open(&gate, Path::new("/"), open).unwrap();
        let mut enter = || {
            let (maps, is_new) = maps.enter().unwrap();
            (*maps, is_new)
        };
        assert_eq!(enter(), (0, false));
        drop(gate.close());
        assert_eq!(enter(), (0, false), "a move that failed");
        gate.close().maps_were_replaced();
        assert_eq!(enter(), (1, true));
        assert_eq!(enter(), (1, false));
    }
}
