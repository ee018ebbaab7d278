//! Unconnected UDP: whose answer a datagram is.

/// How long a question may wait for its answer before the answer is taken for another's, in nanoseconds.
pub const PATIENCE: u64 = 1_000_000_000;

/// How likely a datagram from a backend answers what was asked at `asked` (nanoseconds, as `now`), where a socket uses
/// that backend under several frontends: the highest has it.
///
/// Answers mostly come in the order of the questions. So the oldest question of the last second that has no answer yet
/// comes first; where all are answered, the last that was asked.
#[inline(always)]
#[must_use]
pub const fn claim(asked: u64, unanswered: u32, now: u64) -> u64 {
    const WAITING: u64 = 1 << 63;
    if unanswered != 0 && now.saturating_sub(asked) < PATIENCE {
        WAITING | (WAITING - 1 - asked)
    } else {
        asked
    }
}

/// The number of unanswered questions after one more; what was asked long before is given up.
#[inline(always)]
#[must_use]
pub const fn asked(unanswered: u32, before: u64, now: u64) -> u32 {
    if now.saturating_sub(before) < PATIENCE {
        unanswered.saturating_add(1)
    } else {
        1
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const T: u64 = 77 * PATIENCE;

    #[test]
    fn the_oldest_question_without_an_answer_comes_first() {
        assert!(claim(T, 1, T + 9) > claim(T + 1, 1, T + 9));
        assert!(claim(T, 1, T + 9) > claim(T + 1, 0, T + 9));
        assert!(claim(T + 1, 1, T + 9) > claim(T, 0, T + 9));
    }

    #[test]
    fn where_all_are_answered_the_last_comes_first() {
        assert!(claim(T + 1, 0, T + 9) > claim(T, 0, T + 9));
    }

    #[test]
    fn lost_questions_are_given_up() {
        let now = T + 2 * PATIENCE;
        assert!(claim(now - 5, 0, now) > claim(T, 3, now));
        assert_eq!(asked(3, T, now), 1);
        assert_eq!(asked(3, now - 1, now), 4);
        assert_eq!(asked(u32::MAX, now, now), u32::MAX);
    }
}
