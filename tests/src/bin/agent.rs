//! The agent's process; see `warren_tests::agent`.

fn main() -> anyhow::Result<()> {
    warren_tests::agent::run()
}
