//! Output: tables for people, JSON for programs.

use std::io::{self, Write as _};

use comfy_table::{ContentArrangement, Table, presets};
use serde::Serialize;

use super::Format;

/// Prints a line to standard output.
pub(super) fn print(line: &str) -> anyhow::Result<()> {
    Ok(writeln!(io::stdout().lock(), "{line}")?)
}

/// Prints a line to standard error. An error is ignored, since there is no place left to report it.
pub(super) fn warn(line: &str) {
    writeln!(io::stderr().lock(), "{line}").ok();
}

/// Returns the text of an error with its causes, without those that the text contains already.
pub(super) fn chain(error: &anyhow::Error) -> String {
    let mut text = error.to_string();
    for cause in error.chain().skip(1).map(ToString::to_string) {
        if !text.contains(&cause) {
            text = format!("{text}: {cause}");
        }
    }
    text
}

/// Whether the reader of the output has closed it, as `head` does.
pub(super) fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error
        .downcast_ref::<io::Error>()
        .is_some_and(|e| e.kind() == io::ErrorKind::BrokenPipe)
}

/// Prints rows in the requested format.
pub(super) fn rows<T: Serialize, const N: usize>(
    format: Format,
    header: [&str; N],
    rows: &[T],
    cells: impl Fn(&T) -> [String; N],
) -> anyhow::Result<()> {
    match format {
        Format::Json => json(&rows),
        Format::Table => {
            let mut table = Table::new();
            table
                .load_style(presets::NOTHING)
                .set_content_arrangement(ContentArrangement::Disabled);
            table.set_header(header);
            table.add_rows(rows.iter().map(cells));
            for column in table.column_iter_mut() {
                column.set_padding((0, 2));
            }
            print(&table.trim_fmt())
        }
    }
}

/// Prints a value as JSON.
pub(super) fn json<T: Serialize>(value: &T) -> anyhow::Result<()> {
    print(&serde_json::to_string_pretty(value)?)
}
