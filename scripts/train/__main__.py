from maxtext.train import main

raise SystemExit(main())
