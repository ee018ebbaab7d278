//! Output: tables for people, JSON for programs.

use std::borrow::Cow;
use std::io::{self, Write as _};
use std::iter;

use comfy_table::{ContentArrangement, Table, presets};
use serde::Serialize;

use super::Format;

/// Prints a line to standard output. Control characters are escaped.
pub(super) fn print(line: &str) -> anyhow::Result<()> {
    print_printable(&printable(line))
}

/// Prints the lines of a text to standard output. Control characters in them are escaped.
pub(super) fn print_lines(text: &str) -> anyhow::Result<()> {
    text.lines().try_for_each(print)
}

/// Prints a text that has no control characters but newlines to standard output.
fn print_printable(text: &str) -> anyhow::Result<()> {
    Ok(writeln!(io::stdout().lock(), "{text}")?)
}

/// Prints a message to standard error. Control characters are escaped; lines after the first, which messages of the
/// verifier have, are indented. An error is ignored, since there is no place left to report it.
pub(super) fn warn(message: &str) {
    writeln!(io::stderr().lock(), "{}", indented(message)).ok();
}

/// Returns a message with its control characters escaped, and with indented lines after the first.
fn indented(message: &str) -> String {
    let lines: Vec<_> = message.lines().map(printable).collect();
    lines.join("\n    ")
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
        Format::Table => print_printable(&table(header, rows, cells)),
    }
}

/// Returns rows as a table with escaped control characters, without a newline at the end.
fn table<T, const N: usize>(header: [&str; N], rows: &[T], cells: impl Fn(&T) -> [String; N]) -> String {
    let mut table = Table::new();
    table
        .load_style(presets::NOTHING)
        .set_content_arrangement(ContentArrangement::Disabled);
    table.set_header(header);
    let printable = |row| cells(row).map(|cell| printable(&cell).into_owned());
    table.add_rows(rows.iter().map(printable));
    for column in table.column_iter_mut() {
        column.set_padding((0, 2));
    }
    table.trim_fmt()
}

/// Largest width of the first column of [`pairs`]. The second cell of a row with a longer one follows it directly.
const FIRST_COLUMN: usize = 40;

/// Prints rows of two cells, the first of which may be long in some rows.
pub(super) fn print_pairs<T>(header: [&str; 2], rows: &[T], cells: impl Fn(&T) -> [String; 2]) -> anyhow::Result<()> {
    print_printable(&pairs(header, rows, cells))
}

/// Returns rows of two cells, with escaped control characters.
fn pairs<T>(header: [&str; 2], rows: &[T], cells: impl Fn(&T) -> [String; 2]) -> String {
    let header = header.map(ToOwned::to_owned);
    let rows: Vec<_> = iter::once(header).chain(rows.iter().map(cells)).collect();
    let rows: Vec<_> = rows
        .iter()
        .map(|row| row.each_ref().map(|cell| printable(cell)))
        .collect();
    let widths = rows.iter().map(|[first, _]| first.chars().count());
    let width = widths.filter(|width| *width <= FIRST_COLUMN).max().unwrap_or(0);
    let lines = rows.iter().map(|[first, second]| format!("{first:<width$}  {second}"));
    let lines: Vec<_> = lines.map(|line| line.trim_end().to_owned()).collect();
    lines.join("\n")
}

/// Returns a text with its control characters escaped as in JSON. Names that others choose, such as those of processes and
/// devices, could contain commands for the terminal, or lines of their own.
fn printable(text: &str) -> Cow<'_, str> {
    if !text.contains(char::is_control) {
        return text.into();
    }
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            c if c.is_control() => out.push_str(&format!("\\u{:04x}", u32::from(c))),
            c => out.push(c),
        }
    }
    out.into()
}

/// Prints a value as JSON. `serde_json` escapes control characters of ASCII only; some terminals obey others too.
pub(super) fn json<T: Serialize>(value: &T) -> anyhow::Result<()> {
    print_lines(&serde_json::to_string_pretty(value)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A process name as a pod may choose it.
    const FORGED: &str = "\x1b[31m\nFORGED\x07\u{9b}2J";

    #[test]
    fn control_characters_are_escaped_and_other_text_is_kept() {
        assert_eq!(printable(FORGED), "\\u001b[31m\\nFORGED\\u0007\\u009b2J");
        assert_eq!(
            printable("caf\u{e9} \u{1f600} \\ \"x\""),
            "caf\u{e9} \u{1f600} \\ \"x\""
        );
    }

    #[test]
    fn a_message_of_several_lines_is_indented() {
        assert_eq!(indented("error: \x1b[31m\nFORGED"), "error: \\u001b[31m\n    FORGED");
    }

    #[test]
    fn a_cell_of_a_table_cannot_forge_a_row() {
        let text = table(["NAME", "ID"], &[FORGED, "eth0"], |name| [(*name).into(), "1".into()]);
        assert_eq!(text.lines().count(), 3, "{text:?}");
        assert!(text.chars().all(|c| c == '\n' || !c.is_control()), "{text:?}");
    }

    #[test]
    fn a_long_cell_does_not_pad_the_other_rows() {
        let long = "x".repeat(100);
        let text = pairs(["PROBLEM", ""], &[long.as_str(), "eth0"], |place| {
            [(*place).into(), "broken".into()]
        });
        let lines: Vec<_> = text.lines().map(str::trim_end).collect();
        assert_eq!(lines[1], format!("{long}  broken"));
        assert!(
            lines[2].starts_with("eth0 ") && lines[2].len() <= 40 + 2 + "broken".len(),
            "{text}"
        );
    }
}
