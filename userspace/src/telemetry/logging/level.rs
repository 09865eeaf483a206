//! Which lines there are: filters as `RUST_LOG` takes them, and levels as Istio's users type them at run time.

use super::LoggingError;
use std::{fmt::Write, sync::Arc};
use tracing_subscriber::{EnvFilter, Registry, reload};

/// Changes the level of the running process. Clones share it.
#[derive(Debug, Clone)]
pub struct LogHandle {
    filter: reload::Handle<EnvFilter, Registry>,
    initial: Arc<str>,
}

impl LogHandle {
    /// `initial` is the filter that is in force now.
    pub(super) fn new(filter: reload::Handle<EnvFilter, Registry>, initial: &str) -> Self {
        Self {
            filter,
            initial: initial.into(),
        }
    }

    /// A handle on a filter that no log asks; it holds for as long as the second value lives.
    #[cfg(test)]
    pub(crate) fn detached(filter: &str) -> (Self, reload::Layer<EnvFilter, Registry>) {
        let (layer, handle) = reload::Layer::new(EnvFilter::new(filter));
        (Self::new(handle, filter), layer)
    }

    /// The filter in force.
    pub fn current(&self) -> String {
        self.filter.with_current(ToString::to_string).unwrap_or_default()
    }

    /// Sets the level for everything (`debug`), or for modules beside what is set (`warren::proxy:debug,h2:off`).
    ///
    /// # Errors
    /// It is not understood; nothing changes.
    pub fn set(&self, levels: &str) -> Result<(), LoggingError> {
        self.replace(&merge(&self.current(), levels)?)
    }

    /// Goes back to the filter that the process started with.
    ///
    /// # Errors
    /// The log has ended.
    pub fn reset(&self) -> Result<(), LoggingError> {
        self.replace(&Arc::clone(&self.initial))
    }

    fn replace(&self, filter: &str) -> Result<(), LoggingError> {
        let parsed = parse(filter)?;
        self.filter.reload(parsed).map_err(|_| LoggingError::Twice)
    }
}

/// Checks a filter without setting it.
///
/// # Errors
/// It is not understood.
pub fn check(filter: &str) -> Result<(), LoggingError> {
    parse(filter).map(drop)
}

pub(super) fn parse(filter: &str) -> Result<EnvFilter, LoggingError> {
    EnvFilter::builder()
        .parse(filter)
        .map_err(|source| LoggingError::Filter {
            filter: filter.into(),
            source,
        })
}

/// The filter that `levels` makes of `current`. Directives of Rust's own form (`=`, spans) are not taken here: the
/// request comes over HTTP, and this is the form that Istio's users type.
fn merge(current: &str, levels: &str) -> Result<String, LoggingError> {
    let mut filter = current.to_owned();
    for part in levels.split(',').map(str::trim) {
        let wrong = || LoggingError::Level { part: part.into() };
        let (module, level) = match part.rsplit_once(':') {
            Some((module, level)) => (Some(module), level),
            None => (None, part),
        };
        if !["error", "warn", "info", "debug", "trace", "off"].contains(&level) {
            return Err(wrong());
        }
        match module {
            None => filter = level.to_owned(),
            Some(module) => {
                let named = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | ':');
                if module.is_empty() || !module.chars().all(named) {
                    return Err(wrong());
                }
                let _ = write!(filter, ",{module}={level}");
            }
        }
    }
    Ok(filter)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels_are_merged_as_istios_users_type_them() {
        for (current, levels, expected) in [
            ("info", "debug", Some("debug")),
            ("info", "warren::proxy:debug", Some("info,warren::proxy=debug")),
            (
                "info,h2=off",
                "access:off,h2:warn",
                Some("info,h2=off,access=off,h2=warn"),
            ),
            ("info", "warn,access:info", Some("warn,access=info")),
            ("info", "loud", None),
            ("info", "", None),
            ("info", ":debug", None),
            ("info", "a b:debug", None),
            ("info", "[span{x=1}]:debug", None),
            ("info", "debug,proxy:loud", None),
        ] {
            assert_eq!(merge(current, levels).ok().as_deref(), expected, "{levels}");
        }
    }
}
