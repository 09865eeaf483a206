//! Text that is safe in a line of a log: time stamps, quotes and escapes, whatever a peer put into it.

use std::{
    fmt::{self, Write},
    time::{Duration, SystemTime},
};

/// The longest value in a line, in bytes; a peer's text can be as long as it likes.
pub(super) const LONGEST: usize = 2048;

/// Writes `text` so that it stays one field of one line: quotes, backslashes and control characters are escaped, and what
/// is longer than [`LONGEST`] ends in `…`.
pub(super) struct Escaped<'a> {
    out: &'a mut Vec<u8>,
    style: Style,
    left: usize,
    cut: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Style {
    /// Within double quotes in a text line.
    Quoted,
    /// Not within quotes: only what would break the line is escaped.
    Bare,
    /// Within double quotes in JSON.
    Json,
}

impl<'a> Escaped<'a> {
    pub(super) fn new(out: &'a mut Vec<u8>, style: Style) -> Self {
        Self {
            out,
            style,
            left: LONGEST,
            cut: false,
        }
    }

    fn escape(&mut self, c: char) {
        let mut text = Text(self.out);
        // Writing to a Vec does not fail.
        let _ = match (self.style, c) {
            (Style::Bare, '"' | '\\') => text.write_char(c),
            (_, '"') => text.write_str("\\\""),
            (_, '\\') => text.write_str("\\\\"),
            (_, '\n') => text.write_str("\\n"),
            (_, '\r') => text.write_str("\\r"),
            (_, '\t') => text.write_str("\\t"),
            (Style::Json, _) => write!(text, "\\u{:04x}", u32::from(c)),
            (Style::Bare | Style::Quoted, _) => write!(text, "\\u{{{:x}}}", u32::from(c)),
        };
    }
}

impl Write for Escaped<'_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        // Nearly all names and numbers take this path.
        if !self.cut
            && text.len() <= self.left
            && text
                .bytes()
                .all(|b| matches!(b, b' '..=b'~') && b != b'"' && b != b'\\')
        {
            self.left -= text.len();
            self.out.extend_from_slice(text.as_bytes());
            return Ok(());
        }
        for c in text.chars() {
            if self.cut {
                return Ok(());
            }
            let Some(left) = self.left.checked_sub(c.len_utf8()) else {
                self.cut = true;
                self.out.extend_from_slice("…".as_bytes());
                return Ok(());
            };
            self.left = left;
            // Control characters of the second range and the separators end a line for some readers.
            if c == '"' || c == '\\' || c.is_control() || matches!(c, '\u{2028}' | '\u{2029}') {
                self.escape(c);
            } else {
                self.out.extend_from_slice(c.encode_utf8(&mut [0; 4]).as_bytes());
            }
        }
        Ok(())
    }
}

/// A byte buffer as a target of `write!`.
pub(super) struct Text<'a>(pub(super) &'a mut Vec<u8>);

impl Write for Text<'_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        self.0.extend_from_slice(text.as_bytes());
        Ok(())
    }
}

/// Writes `time` as `2024-08-21T15:32:05.754291Z`.
pub(super) fn time_stamp(time: SystemTime, out: &mut Vec<u8>) {
    let since = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or(Duration::ZERO);
    let (days, second) = (since.as_secs() / 86_400, since.as_secs() % 86_400);
    let (year, month, day) = civil(days);
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    let micros = since.subsec_micros();
    // Writing to a Vec does not fail.
    let _ = write!(
        Text(out),
        "{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{micros:06}Z"
    );
}

/// Year, month and day of the Gregorian calendar, `days` after 1970-01-01.
fn civil(days: u64) -> (u64, u64, u64) {
    // Years are counted from March, so that the leap day comes last; 719,468 days lie between 0000-03-01 and the epoch.
    let days = days + 719_468;
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 {
        month_from_march + 3
    } else {
        month_from_march - 9
    };
    (era * 400 + year_of_era + u64::from(month <= 2), month, day)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn escaped(text: &str, style: Style) -> String {
        let mut out = Vec::new();
        write!(Escaped::new(&mut out, style), "{text}").unwrap();
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn a_time_stamp_is_utc_with_microseconds() {
        for (seconds, micros, expected) in [
            (0, 0, "1970-01-01T00:00:00.000000Z"),
            (951_782_400, 1, "2000-02-29T00:00:00.000001Z"),
            (951_868_800, 0, "2000-03-01T00:00:00.000000Z"),
            (1_724_254_325, 754_291, "2024-08-21T15:32:05.754291Z"),
            (1_735_689_599, 999_999, "2024-12-31T23:59:59.999999Z"),
            (4_107_542_400, 0, "2100-03-01T00:00:00.000000Z"),
        ] {
            let mut out = Vec::new();
            time_stamp(SystemTime::UNIX_EPOCH + Duration::new(seconds, micros * 1000), &mut out);
            assert_eq!(String::from_utf8(out).unwrap(), expected);
        }
    }

    #[test]
    fn no_text_ends_its_field_or_its_line() {
        let text = "a\"b\\c\nd\r\te\u{1b}[31m\u{85}\u{2028}é";
        assert_eq!(
            escaped(text, Style::Quoted),
            r#"a\"b\\c\nd\r\te\u{1b}[31m\u{85}\u{2028}é"#
        );
        assert_eq!(escaped(text, Style::Bare), r#"a"b\c\nd\r\te\u{1b}[31m\u{85}\u{2028}é"#);
        let json = format!("\"{}\"", escaped(text, Style::Json));
        assert_eq!(serde_json::from_str::<String>(&json).unwrap(), text);
    }

    #[test]
    fn a_long_text_is_cut_and_marked() {
        let text = escaped(&"é".repeat(LONGEST), Style::Quoted);
        assert_eq!(text, "é".repeat(LONGEST / 2) + "…");
        assert_eq!(
            escaped(&"a".repeat(LONGEST), Style::Quoted).len(),
            LONGEST,
            "what fits is whole"
        );
    }
}
