//! Unconnected UDP: matching of replies to requests.

/// Time in nanoseconds after which a request without a reply counts as lost.
pub const REPLY_TIMEOUT: u64 = 1_000_000_000;

/// Returns the priority of a request that was sent at `asked` (nanoseconds, like `now`) as the one that a datagram from a
/// backend replies to. A socket may use a backend under several frontends; the request with the highest priority is chosen.
///
/// Replies mostly arrive in the order of their requests. So the oldest request of the last second without a reply comes
/// first. If all have a reply, the latest request comes first.
#[inline(always)]
#[must_use]
pub const fn priority(asked: u64, unanswered: u32, now: u64) -> u64 {
    const WAITING: u64 = 1 << 63;
    if unanswered != 0 && now.saturating_sub(asked) < REPLY_TIMEOUT {
        WAITING | (WAITING - 1 - asked)
    } else {
        asked
    }
}

/// Returns the number of requests without a reply after one more request. Requests older than [`REPLY_TIMEOUT`] count as lost.
#[inline(always)]
#[must_use]
pub const fn unanswered_after_request(unanswered: u32, before: u64, now: u64) -> u32 {
    if now.saturating_sub(before) < REPLY_TIMEOUT {
        unanswered.saturating_add(1)
    } else {
        1
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const T: u64 = 77 * REPLY_TIMEOUT;

    #[test]
    fn oldest_request_without_a_reply_comes_first() {
        assert!(priority(T, 1, T + 9) > priority(T + 1, 1, T + 9));
        assert!(priority(T, 1, T + 9) > priority(T + 1, 0, T + 9));
        assert!(priority(T + 1, 1, T + 9) > priority(T, 0, T + 9));
    }

    #[test]
    fn latest_request_comes_first_if_all_have_replies() {
        assert!(priority(T + 1, 0, T + 9) > priority(T, 0, T + 9));
    }

    #[test]
    fn lost_requests_are_not_counted() {
        let now = T + 2 * REPLY_TIMEOUT;
        assert!(priority(now - 5, 0, now) > priority(T, 3, now));
        assert_eq!(unanswered_after_request(3, T, now), 1);
        assert_eq!(unanswered_after_request(3, now - 1, now), 4);
        assert_eq!(unanswered_after_request(u32::MAX, now, now), u32::MAX);
    }
}
