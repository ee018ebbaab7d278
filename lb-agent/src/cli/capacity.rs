//! The `--max-*` flags of `lb-agent run`, from the registry of maps.

use std::sync::LazyLock;

use clap::error::Error;
use clap::{Arg, ArgAction, ArgMatches, Args, Command, FromArgMatches, value_parser};
use lb_common::abi::SizedMap;

use lb_core::maps::Capacities;

/// Numbers of entries of maps. A start replaces pinned maps with another number.
#[derive(Debug, Clone, Copy)]
pub(super) struct CapacityArgs(pub(super) Capacities);

/// The defaults as text, in the order of [`SizedMap::ALL`].
static DEFAULTS: LazyLock<Vec<String>> = LazyLock::new(|| {
    let all = SizedMap::ALL.iter();
    all.map(|map| map.default_capacity().to_string()).collect()
});

impl Args for CapacityArgs {
    fn augment_args(command: Command) -> Command {
        let flags = SizedMap::ALL.iter().zip(DEFAULTS.iter());
        command.args(flags.map(|(map, default)| {
            let (min, max) = map.range();
            Arg::new(map.flag())
                .long(map.flag())
                .value_name("N")
                .default_value(default.as_str())
                .value_parser(value_parser!(u32).range(i64::from(min)..=i64::from(max)))
                .action(ArgAction::Set)
                .help(map.help())
                .help_heading("Capacities (pinned maps with other numbers are replaced at the start, while they serve)")
        }))
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}

impl FromArgMatches for CapacityArgs {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, Error> {
        let mut args = Self(Capacities::DEFAULT);
        args.update_from_arg_matches(matches)?;
        Ok(args)
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), Error> {
        for map in SizedMap::ALL {
            if let Some(entries) = matches.get_one::<u32>(map.flag()) {
                // The slot of a socket is found by a mask.
                let is_rounded = *map == SizedMap::Sockets;
                let entries = if is_rounded {
                    entries.next_power_of_two()
                } else {
                    *entries
                };
                self.0 = self.0.with(*map, entries);
            }
        }
        Ok(())
    }
}
