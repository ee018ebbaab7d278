//! The flags of `lb-agent run` for the sizes of maps: `--max-*`, from the registry of maps, and `--map-memory`.

use std::sync::LazyLock;
use std::time::Duration;

use clap::error::Error;
use clap::{Arg, ArgAction, ArgMatches, Args, Command, FromArgMatches, value_parser};
use lb_common::abi::SizedMap;
use lb_core::maps::{Capacities, sizing};

use crate::daemon::MapSettings;

const HEADING: &str = "Capacities (upper bounds: maps grow and shrink with their use, while they serve)";
const MEMORY: &str = "map-memory";
const SHRINK_AFTER: &str = "shrink-after";

/// The limits of the sizes of maps.
#[derive(Debug, Clone)]
pub(super) struct CapacityArgs(pub(super) MapSettings);

/// The flags for the smallest numbers of entries, and the defaults of those for the largest as text, in the order of
/// [`SizedMap::ALL`].
static FLAGS: LazyLock<Vec<(String, String)>> = LazyLock::new(|| {
    let all = SizedMap::ALL.iter();
    all.map(|map| (map.flag().replace("max-", "min-"), map.default_bound().to_string()))
        .collect()
});

/// Returns a number of bytes from text such as `512Mi`.
fn bytes(text: &str) -> Result<u64, String> {
    let units = [("Ki", 10), ("Mi", 20), ("Gi", 30)];
    let unit = units
        .into_iter()
        .find_map(|(unit, shift)| Some((text.strip_suffix(unit)?, shift)));
    let (number, shift) = unit.unwrap_or((text, 0));
    let bytes = number
        .parse::<u64>()
        .ok()
        .and_then(|number| number.checked_mul(1 << shift));
    bytes.ok_or_else(|| "a number of bytes is required, or of Ki, Mi or Gi: 512Mi".into())
}

impl Args for CapacityArgs {
    fn augment_args(command: Command) -> Command {
        let flags = SizedMap::ALL.iter().zip(FLAGS.iter());
        let number = |map: &SizedMap| {
            let (min, max) = map.range();
            value_parser!(u32).range(i64::from(min)..=i64::from(max))
        };
        let bounds = flags.clone().map(|(map, (_, default))| {
            Arg::new(map.flag())
                .long(map.flag())
                .value_name("N")
                .default_value(default.as_str())
                .value_parser(number(map))
                .action(ArgAction::Set)
                .help(map.help())
                .help_heading(HEADING)
        });
        // For tests.
        let minimums = flags.map(|(map, (flag, _))| {
            Arg::new(flag.as_str())
                .long(flag.as_str())
                .value_name("N")
                .value_parser(number(map))
                .action(ArgAction::Set)
                .hide(true)
        });
        let memory = Arg::new(MEMORY)
            .long(MEMORY)
            .value_name("BYTES")
            .value_parser(bytes)
            .action(ArgAction::Set)
            .help(
                "Largest size of all maps together in kernel memory, such as 512Mi; also limited by the memory limits of the \
                 agent's cgroups, if the agent finds them [default: a tenth of the machine's memory, at most 1Gi]",
            )
            .help_heading(HEADING);
        let shrink_after = Arg::new(SHRINK_AFTER)
            .long(SHRINK_AFTER)
            .value_name("MS")
            .value_parser(value_parser!(u64))
            .action(ArgAction::Set)
            .hide(true);
        command.arg(memory).args(bounds).args(minimums).arg(shrink_after)
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}

impl FromArgMatches for CapacityArgs {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, Error> {
        let mut args = Self(MapSettings {
            bound: Capacities::BOUND,
            minimum: Vec::new(),
            memory: None,
            shrink_after: sizing::SHRINK_AFTER,
        });
        args.update_from_arg_matches(matches)?;
        Ok(args)
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), Error> {
        let settings = &mut self.0;
        let number = |map: SizedMap, flag: &str| {
            let entries = *matches.get_one::<u32>(flag)?;
            // A mask selects the slot of a socket.
            Some(if map == SizedMap::Sockets {
                entries.next_power_of_two()
            } else {
                entries
            })
        };
        for (map, (minimum, _)) in SizedMap::ALL.iter().zip(FLAGS.iter()) {
            if let Some(entries) = number(*map, map.flag()) {
                settings.bound = settings.bound.with(*map, entries);
            }
            settings
                .minimum
                .extend(number(*map, minimum).map(|entries| (*map, entries)));
        }
        settings.memory = matches.get_one::<u64>(MEMORY).copied().or(settings.memory);
        if let Some(ms) = matches.get_one::<u64>(SHRINK_AFTER) {
            settings.shrink_after = Duration::from_millis(*ms);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::bytes;

    #[test]
    fn memory_has_a_unit() {
        for (text, expected) in [
            ("0", Some(0)),
            ("1000", Some(1000)),
            ("4Ki", Some(4096)),
            ("512Mi", Some(512 << 20)),
            ("2Gi", Some(2 << 30)),
            ("Mi", None),
            ("1.5Gi", None),
            ("-1", None),
            ("17179869184Gi", None),
        ] {
            assert_eq!(bytes(text).ok(), expected, "{text}");
        }
    }
}
